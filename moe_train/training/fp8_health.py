"""What a run does where FP8 loses too much of a layer's operands: says so, stops, or gives the layer up.

The rates are those of `precision/health.py`, summed over ranks, so every rank decides alike. A module that went back to
the compute format stays there for as long as the run keeps its recipe: checkpoints know it. Nothing can be saved by
going back where operands are infinite or NaN, as the weights are NaN after that step: the run ends as it does for any
loss that is not finite, and says in which layer it began.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from moe_train.config import Fp8Config, PrecisionConfig, differences, to_dict
from moe_train.model.transformer import Transformer
from moe_train.precision import recipes
from moe_train.precision.health import Counts, LayerRates, Operand, Rates


class Excess(NamedTuple):
    """A rate beyond its limit."""

    layer: str
    operand: Operand
    rate: str
    value: float
    limit: float

    def __str__(self) -> str:
        return (
            f"the {self.rate} of the {self.operand} of {self.layer} is {self.value:.3g}, more than "
            f"precision.health.max_{self.rate}={self.limit:g}"
        )


class Verdict(NamedTuple):
    """What follows from the rates of a logged step."""

    notes: list[str]
    stop: str | None  # why the run ends
    returned: bool  # whether modules went back to the compute format


class Fp8Health:
    """Of one run, whose `model` has its FP8 layers already. `checkpoint`: the state it goes on from."""

    def __init__(
        self,
        precision: PrecisionConfig,
        model: Transformer,
        device: torch.device,
        compute_format: str,
        checkpoint: Mapping[str, Any] | None,
    ) -> None:
        self._precision, self._model, self._compute_format = precision, model, compute_format
        layers = recipes.fp8_layers(model)
        self.counts = Counts(layers, device) if precision.health is not None else None
        self.in_compute_format = modules_in_compute_format(checkpoint or {}, precision)
        recipes.to_compute_format(model, self.in_compute_format)
        self._warned: set[tuple[str, str]] = set()

    def judge(self, rates: LayerRates, step: int, ends: bool) -> Verdict:
        """`step`: the last one done. A run that `ends` with it is not stopped by a limit, only told of it."""
        health = self._precision.health
        found = [] if health is None else excesses(rates, health.__dict__)
        if health is None or not found:
            return Verdict([], None, False)
        worst = max(found, key=lambda excess: excess.value - excess.limit)
        if health.action == "stop" and not ends:
            return Verdict([], f"FP8 at step {step}: {worst}", False)
        if health.action == "compute_format":
            modules = sorted({recipes.module_of(excess.layer) for excess in found})
            recipes.to_compute_format(self._model, modules)
            self.in_compute_format += modules
            note = (
                f"FP8: from step {step + 1} on these modules run in {self._compute_format}: {', '.join(modules)}; "
                f"{worst}; mixed_precision_utilization is not known from here on"
            )
            return Verdict([note], None, True)
        new = {(excess.layer, excess.rate) for excess in found} - self._warned
        self._warned |= new
        others = len({layer for layer, _ in new}) - 1
        beside = f" ({others} other layers are beyond a limit too)" if others > 0 else ""
        return Verdict([f"FP8 at step {step}: {worst}{beside}"] if new else [], None, False)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        recipe = self._precision.fp8
        if recipe is None:
            return {}
        return {"fp8": {"recipe": to_dict(recipe), "modules_in_compute_format": self.in_compute_format}}


def modules_in_compute_format(checkpoint: Mapping[str, Any], precision: PrecisionConfig) -> list[str]:
    """Those that a checkpoint's state says went back, if that was with the recipe of `precision`."""
    from moe_train.compose import validated

    kept = checkpoint.get("fp8")
    if kept is None or precision.fp8 is None:
        return []
    if validated(Fp8Config, kept["recipe"], "the recipe of the checkpoint") != precision.fp8:
        return []
    return list(kept["modules_in_compute_format"])


def precision_notes(before: PrecisionConfig | None, now: PrecisionConfig, checkpoint: Mapping[str, Any]) -> list[str]:
    """What a run that goes on says of its precision, where that was another one `before`."""
    if before is None:
        return []
    changed = differences(to_dict(before), to_dict(now), "precision")
    named = before.name != now.name
    keys = f"precision={now.name}, before precision={before.name}" if named else ", ".join(key for key, *_ in changed)
    notes = [f"from here on another precision: {keys}"]
    kept = checkpoint.get("fp8") or {"modules_in_compute_format": []}
    again = set(kept["modules_in_compute_format"]) - set(modules_in_compute_format(checkpoint, now))
    if again and now.fp8 is not None:
        modules = ", ".join(sorted(again))
        notes.append(f"FP8: these modules had gone back with the recipe before and multiply in FP8 again: {modules}")
    return notes


def excesses(rates: LayerRates, limits: Mapping[str, Any]) -> list[Excess]:
    """`limits`: of each rate, by `max_` and its name; None: there is none."""
    return [
        Excess(layer, operand, rate, value, limit)
        for layer, by_operand in rates.items()
        for operand, found in by_operand.items()
        for rate, value in found._asdict().items()
        if (limit := limits[f"max_{rate}"]) is not None and value > limit
    ]


def where_not_finite(rates: LayerRates) -> str | None:
    """The first layer on the way whose operands are not finite: of the forward pass, else of the backward pass."""

    def layers(*operands: Operand) -> list[str]:
        none = Rates(0.0, 0.0, 0.0)
        return [
            f"the {operand} of {layer}"
            for layer, by_operand in rates.items()
            for operand in operands
            if by_operand.get(operand, none).nonfinite_rate > 0
        ]

    forward, backward = layers("input", "weight"), layers("gradient")
    return forward[0] if forward else backward[-1] if backward else None
