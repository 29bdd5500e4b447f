"""Which backend multiplies in FP8 on a device, and why; an error where what was asked for cannot be had.

What runs where (torch 2.11 to 2.13):

    emulated   any device; on a CPU whose kernels are compiled, products of BF16 numbers, which FP8 numbers are
    cublas     scales of rows or tensors: compute capability 8.9 and later, and CPUs, which have no FP8 units
    triton     every recipe: compute capability 8.0 and later; before 8.9 FP8 is stored and multiplied as FP16
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moe_train.config import Fp8Config, PrecisionConfig
from moe_train.errors import UserError
from moe_train.kernels.cpu import library
from moe_train.precision.backends import Backend, Rate
from moe_train.precision.compiled_fp8 import CompiledFp8
from moe_train.precision.cublas import MULTIPLE, Cublas
from moe_train.precision.emulated import Emulated


class Choice(NamedTuple):
    backend: Backend
    note: str  # what was taken and why, for the run to say


@dataclass(frozen=True)
class Device:
    """What decides: the name, and for a CUDA device its compute capability."""

    name: str
    capability: tuple[int, int] | None
    has_triton: bool  # or Triton's interpreter, on a CPU
    has_compiled: bool = False  # the kernels in C of a CPU

    @classmethod
    def of(cls, device: torch.device) -> Device:
        installed = importlib.util.find_spec("triton") is not None
        if device.type == "cuda":
            return cls(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), installed)
        interpreted = installed and os.environ.get("TRITON_INTERPRET") == "1"
        return cls("a CPU", None, interpreted, device.type == "cpu" and library.in_use() is not None)

    @property
    def multiplies_fp8(self) -> bool:
        return self.capability is not None and self.capability >= (8, 9)


def choose(precision: PrecisionConfig, device: Device, sizes: set[int]) -> Choice:
    """`sizes`: inputs and outputs of the layers. Raises UserError where the backend asked for cannot do the recipe."""
    recipe = precision.fp8
    assert recipe is not None

    def taken(name: str, why: str) -> Choice:
        return Choice(_built(name, recipe, device), _said(precision, name, why, device))

    asked = precision.backend
    if asked != "auto":
        missing = _missing(asked, recipe, device, sizes)
        if missing is not None:
            why, remedy = missing
            raise UserError(f"precision.backend={asked} cannot do precision={precision.name} here: {why}; {remedy}")
        return taken(asked, "as asked for")
    if device.capability is None:
        return taken("emulated", f"{device.name} has no FP8 units")
    # torch's, where it has a grouped form; else our own, which needs no host either.
    names = ("cublas", "triton") if device.capability in ((9, 0), (10, 0)) else ("triton",)
    reasons: list[str] = []
    for name in names:
        missing = _missing(name, recipe, device, sizes)
        if missing is None:
            return taken(name, "; ".join([*reasons, f"{device.name} runs it"]))
        reasons.append(f"not {name}: {missing[0]}")
    return taken("emulated", "; ".join(reasons))


def _missing(backend: str, recipe: Fp8Config, device: Device, sizes: set[int]) -> tuple[str, str] | None:
    """Why it cannot, and what can."""
    if backend == "emulated":
        return None
    if recipe.accumulation != "float32":
        return "the accumulation of Hopper is a model of the emulated backend", "set precision.fp8.accumulation=float32"
    if backend == "cublas":
        return _cublas_lacks(recipe, device, sizes)
    if device.capability is None:
        if device.has_triton:
            return None
        return f"{device.name} runs Triton's kernels in its interpreter only", "set precision.backend=emulated"
    if not device.has_triton:
        return "Triton is not installed", "install triton, or set precision.backend=emulated"
    if device.capability < (8, 0):
        return f"{device.name} is older than compute capability 8.0", "set precision.backend=emulated"
    return None


def _cublas_lacks(recipe: Fp8Config, device: Device, sizes: set[int]) -> tuple[str, str] | None:
    operands = [
        *(recipe.forward.activation, recipe.forward.weight),
        *(recipe.input_gradient.gradient, recipe.input_gradient.weight),
        *(recipe.weight_gradient.gradient, recipe.weight_gradient.activation),
    ]
    finer = sorted({o.scale_of for o in operands} - {"row", "tensor"})
    if finer:
        return (
            f"torch's scaled matmul has no scales of a {' or a '.join(finer)} for experts",
            "the nearest recipe that it runs is precision=fp8_rowwise; backend=auto takes what runs this one",
        )
    if device.capability is not None and not device.multiplies_fp8:
        return (
            f"{device.name} has no FP8 units (compute capability 8.9)",
            "set precision.backend=auto, or precision=bf16 for speed",
        )
    if device.capability is not None and any(operand.format == "e5m2" for operand in operands):
        # The right one of two for linear layers, both for experts (torch's RowwiseScaledMM.cu and ScaledBlas.cpp).
        return (
            "torch's scaled matmul takes E4M3 alone for experts",
            "the nearest recipe that it runs is precision=fp8_rowwise; backend=auto takes what runs this one",
        )
    odd = sorted(size for size in sizes if size % MULTIPLE)
    if device.capability is not None and odd:
        return f"sizes must be multiples of {MULTIPLE}, and a layer has {odd[0]}", "change it, or set backend=auto"
    return None


def _built(name: str, recipe: Fp8Config, device: Device) -> Backend:
    if name == "emulated":
        return CompiledFp8() if _compiled(recipe, device) else Emulated(recipe.accumulation)
    if name == "cublas":
        return Cublas(device.capability)
    from moe_train.precision.triton_backend import Triton  # Triton is not everywhere

    # FP16, where there are no FP8 units, is as fast as BF16.
    in_fp16: Rate = "float32" if device.capability is None else "bfloat16"
    return Triton("float8" if device.multiplies_fp8 else in_fp16)


def _compiled(recipe: Fp8Config, device: Device) -> bool:
    return device.has_compiled and recipe.accumulation == "float32"


_SPEED = {
    "emulated": "rounded to FP8 and multiplied in FP32 (emulated), which shows what it does to the loss and nothing of "
    "its speed",
    "cublas": "rounded to FP8 and multiplied by torch's scaled matmul (cublas)",
    "triton": "rounded and multiplied by the project's kernels (triton)",
}


def _said(precision: PrecisionConfig, backend: str, why: str, device: Device) -> str:
    how = _SPEED[backend]
    assert precision.fp8 is not None
    if backend == "emulated" and _compiled(precision.fp8, device):
        how = "rounded to FP8 and multiplied as BF16 numbers by the kernels in C, to FP32 sums (emulated)"
    if backend == "triton" and not device.multiplies_fp8:
        how += ", in FP16, as the device has no FP8 units" if device.capability else ", interpreted"
    return f"precision={precision.name}: products are {how}; {why}"
