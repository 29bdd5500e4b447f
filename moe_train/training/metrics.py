"""The names under which losses and loads are logged; what a step costs has its names in `cost/meter.py`."""

from __future__ import annotations

from collections.abc import Sequence

from moe_train.config import MoEConfig
from moe_train.cost.value import bits_per_byte_a_dollar
from moe_train.model.balancing import load_statistics
from moe_train.precision.health import OPERANDS, LayerRates, Rates
from moe_train.training.evaluation import Evaluation
from moe_train.training.step import StepFigures

Metrics = dict[str, float | None]


def of_steps(figures: StepFigures, moe: MoEConfig | None) -> Metrics:
    """Of the steps since the last log."""
    row: Metrics = {
        "train/loss": figures.loss,
        "train/grad_norm": figures.grad_norm,
        "train/batch_size": float(figures.batch_size),
    }
    if moe is not None:
        row |= load_statistics(figures.counts_le)
        row["train/auxiliary_loss"] = figures.auxiliary_loss
        if moe.capacity_factor is not None:
            row["moe/dropped_fraction"] = figures.dropped_fraction
    if figures.mtp_losses:
        row["train/mtp_weight"] = figures.mtp_weight
    return row | _of_mtp("train", figures.mtp_losses)


def of_fp8(rates: LayerRates) -> Metrics:
    """Each rate of the worst operand of every layer, of the worst layer for every operand, and of the worst of all."""
    row: Metrics = {}
    for name in Rates._fields:
        of = {
            (layer, operand): float(getattr(found, name))
            for layer, by_operand in rates.items()
            for operand, found in by_operand.items()
        }
        if of:
            row[f"fp8/{name}"] = max(of.values())
        for operand in OPERANDS:
            if any(at == operand for _, at in of):
                row[f"fp8/{operand}/{name}"] = max(value for (_, at), value in of.items() if at == operand)
        for layer in rates if of else ():  # null: one that is in FP8 no longer
            row[f"fp8/{layer}/{name}"] = max((value for (at, _), value in of.items() if at == layer), default=None)
    return row


def of_evaluation(evaluation: Evaluation, usd_total: float | None) -> Metrics:
    """`usd_total`: the whole bill so far."""
    row: Metrics = {
        "val/loss": evaluation.loss,
        "val/bits_per_byte": evaluation.bits_per_byte,
        "cost/bits_per_byte_a_dollar": bits_per_byte_a_dollar(evaluation.bits_per_byte, usd_total),
    }
    return row | _of_mtp("val", evaluation.mtp_losses)


def _of_mtp(split: str, losses: Sequence[float]) -> Metrics:
    """Their mean, which λ weighs, and each depth's own."""
    if not losses:
        return {}
    by_depth: Metrics = {f"{split}/mtp_loss_{depth}": loss for depth, loss in enumerate(losses, start=1)}
    return {f"{split}/mtp_loss": sum(losses) / len(losses), **by_depth}
