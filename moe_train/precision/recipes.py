"""Which layers of a model a recipe is for, which of them go back to the compute format, and what runs in what."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from moe_train.config import Fp8Config, OperandConfig, PrecisionConfig
from moe_train.errors import UserError
from moe_train.model.experts import Experts
from moe_train.model.layers import Linear, SwiGLU
from moe_train.model.transformer import Transformer
from moe_train.precision.choice import Choice, Device, choose
from moe_train.precision.fp8 import Fp8Layer
from moe_train.precision.support import router_in_tf32

# Layers outside these are the embedding's, the head's and the final norm's, which stay in the compute format.
_ROOMS = ("blocks.", "mtp.")
_OF_SWIGLU = ("gate_up_proj", "down_proj")
# What a recipe may name although the model has none, being dense.
_OF_EXPERTS = tuple(f"{owner}.{part}" for owner in ("experts", "shared_experts") for part in _OF_SWIGLU)


def apply(model: Transformer, precision: PrecisionConfig, device: torch.device) -> Choice | None:
    """Give every linear layer of the blocks its FP8 products, if the recipe has any.

    Returns what multiplies them on `device` and why. Raises UserError where it lacks the backend asked for.
    """
    recipe = precision.fp8
    if recipe is None:
        return None
    layers = _layers_of(model)
    sizes = {size for module in layers.values() for weight in module.parameters() for size in weight.shape[-2:]}
    choice = choose(precision, Device.of(device), sizes)
    for name, module in layers.items():
        module.evaluates_in_fp8 = precision.evaluate_in_fp8
        if isinstance(module, Linear):
            module.fp8 = Fp8Layer(_of_layer(recipe, name), choice.backend)
        else:
            first, second = (Fp8Layer(_of_layer(recipe, f"{name}.{part}"), choice.backend) for part in _OF_SWIGLU)
            module.fp8 = first, second
    _check_names(recipe, {name.rpartition(".")[2] for name in layers} - {"experts"})
    return choice


def _check_names(recipe: Fp8Config, layers: set[str]) -> None:
    known = sorted({*layers, *_OF_SWIGLU, *_OF_EXPERTS})
    for key in ("power_of_two_inputs_of", "power_of_two_gradients_of"):
        for name in getattr(recipe, key):
            if name not in known:
                raise UserError(
                    f"precision.fp8.{key} names {name}, and the model has {', '.join(known)}: choose among them"
                )


def _layers_of(model: Transformer) -> dict[str, Linear | Experts]:
    """Those a recipe is for, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(_ROOMS) and isinstance(module, Linear | Experts)
    }


def _of_layer(recipe: Fp8Config, layer: str) -> Fp8Config:
    """The recipe with the scales that it wants of `layer` (its full name) made powers of two."""

    def named(names: tuple[str, ...]) -> bool:
        return any(f".{layer}".endswith(f".{name}") for name in names)

    return with_powers_of_two(recipe, named(recipe.power_of_two_inputs_of), named(recipe.power_of_two_gradients_of))


def with_powers_of_two(recipe: Fp8Config, inputs: bool, gradients: bool) -> Fp8Config:
    """The recipe with the scales of a layer's input, or of its result's gradient, made powers of two."""

    def rounded(operand: OperandConfig, too: bool) -> OperandConfig:
        return dataclasses.replace(operand, power_of_two=operand.power_of_two or too)

    forward, backward, of_weights = recipe.forward, recipe.input_gradient, recipe.weight_gradient
    return dataclasses.replace(
        recipe,
        forward=dataclasses.replace(forward, activation=rounded(forward.activation, inputs)),
        input_gradient=dataclasses.replace(backward, gradient=rounded(backward.gradient, gradients)),
        weight_gradient=dataclasses.replace(
            of_weights,
            activation=rounded(of_weights.activation, inputs),
            gradient=rounded(of_weights.gradient, gradients),
        ),
    )


def fp8_layers(model: Transformer) -> dict[str, Fp8Layer]:
    """Those that multiply in FP8 in training, by name, in the order of the forward pass."""
    found: dict[str, Fp8Layer] = {}
    for name, module in _layers_of(model).items():
        if isinstance(module, Linear) and module.fp8 is not None:
            found[name] = module.fp8
        elif isinstance(module, Experts) and module.fp8 is not None:
            found |= {f"{name}.{part}": layer for part, layer in zip(_OF_SWIGLU, module.fp8)}
    return found


def modules_in_fp8(model: Transformer) -> list[Linear | Experts]:
    """Those that multiply in FP8 in training: until `to_compute_format` takes their `fp8` away."""
    return [module for module in _layers_of(model).values() if module.fp8 is not None]


def module_of(layer: str) -> str:
    """What goes back to the compute format as one: a SwiGLU is one operator (precision/fp8_swiglu.py)."""
    module, _, part = layer.rpartition(".")
    return module if part in _OF_SWIGLU else layer


def to_compute_format(model: Transformer, modules: Iterable[str]) -> None:
    """Products of `modules` (names as `module_of` gives them) are in FP8 no longer."""
    for name in modules:
        module = model.get_submodule(name)
        for part in (module.gate_up_proj, module.down_proj) if isinstance(module, SwiGLU) else (module,):
            assert isinstance(part, Linear | Experts)
            part.fp8 = None


def table(model: Transformer, compute: torch.dtype, device: torch.device) -> list[dict[str, Any]]:
    """A row for each kind of layer: what its three products run in, on a device that computes in `compute`.

    `but`: the layers of the kind that went back to the compute format.
    """
    compute_format = str(compute).removeprefix("torch.")
    rows: dict[str, dict[str, Any]] = {
        "embedding": {"layer": "embedding", "all": "a lookup in float32"},
    }
    of_kind: dict[str, dict[str, Fp8Layer | None]] = {}
    for name, module in _layers_of(model).items():
        parts: dict[str, Fp8Layer | None]
        if isinstance(module, Linear):
            parts = {name: module.fp8}
        else:
            parts = {f"{name}.{part}": layer for part, layer in zip(_OF_SWIGLU, module.fp8 or (None, None))}
        for full_name, layer in parts.items():
            kind = ".".join(part for part in full_name.split(".")[1:] if not part.isdigit())
            of_kind.setdefault(kind, {})[full_name] = layer
    for kind, layers in of_kind.items():
        wide = [name for name, layer in layers.items() if layer is None]
        rows[kind] = _row(kind, next(filter(None, layers.values()), None), compute_format)
        if 0 < len(wide) < len(layers):
            rows[kind]["but"] = dict.fromkeys(wide, compute_format)
    rows["router"] = {"layer": "router", "all": "tensorfloat32" if router_in_tf32(device, compute) else "float32"}
    rows["attention core"] = {"layer": "attention core", "all": compute_format}
    rows["norms"] = {"layer": "norms", "all": "float32"}
    rows["head"] = {"layer": "head", "all": compute_format}
    if not any(isinstance(module, Experts) for module in model.modules()):
        del rows["router"]
    return list(rows.values())


def _row(name: str, layer: Fp8Layer | None, compute_format: str) -> dict[str, Any]:
    if layer is None:
        return {"layer": name, "all": compute_format}
    recipe = layer.recipe
    return {
        "layer": name,
        "forward": f"{_said(recipe.forward.activation)} · {_said(recipe.forward.weight)}",
        "input_gradient": f"{_said(recipe.input_gradient.gradient)} · {_said(recipe.input_gradient.weight)}",
        "weight_gradient": f"{_said(recipe.weight_gradient.gradient)} · {_said(recipe.weight_gradient.activation)}",
        "accumulation": recipe.accumulation,
        "backend": layer.backend.name,
        "multiplied_in": layer.backend.multiplies_in,
    }


def _said(operand: OperandConfig) -> str:
    return f"{operand.format} a {operand.scale_of}" + (", 2ⁿ" if operand.power_of_two else "")
