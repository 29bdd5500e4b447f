"""suite=kernels: the experts' grouped products in their three directions, and rounding to FP8.

A kernel is a row of `KERNELS`: a function of (x, weight, ends) with a gradient, as `precision/matmul.py` has it. Each
is held against one dense product of as many FLOPs and against the fastest square product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_train.benchmark import tax
from moe_train.benchmark.bench import Bench, experts_of
from moe_train.benchmark.ceilings import copying, square_matmul_tflops
from moe_train.benchmark.figures import Figure, estimate, measured, not_measured, paired
from moe_train.benchmark.timing import Call, interleaved
from moe_train.config import OperandConfig, PrecisionConfig, RunConfig
from moe_train.kernels.layouts import Rows, Weights
from moe_train.precision.choice import Device, choose
from moe_train.precision.fp8 import Fp8Layer
from moe_train.precision.matmul import grouped_linear

Multiply = Callable[[Tensor, Tensor, Tensor], Tensor]  # x (n, in), weight (e, out, in), ends (e) int32 → (n, out)


@dataclass(frozen=True)
class Kernel:
    """`make` gives the product for a recipe (that of `precision=`, by default fp8_deepseek)."""

    name: str
    make: Callable[[PrecisionConfig, Shape, torch.device], Multiply]
    note: str | None = None


def _fp8(precision: PrecisionConfig, shape: Shape, device: torch.device) -> Multiply:
    assert precision.fp8 is not None
    layer = Fp8Layer(precision.fp8, choose(precision, Device.of(device), {shape.inputs, shape.outputs}).backend)
    return lambda x, weight, ends: grouped_linear(x, weight, ends, layer)


KERNELS = (
    Kernel("grouped", lambda *_: grouped_linear),
    Kernel("grouped_fp8", _fp8, "through the seam's FP8 layer, both operands rounded in every call"),
)


@dataclass(frozen=True)
class Shape:
    """Rows of tokens, sorted by expert, times one weight an expert."""

    name: str
    rows: int
    experts: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inputs * self.outputs

    @property
    def said(self) -> str:
        return f"{self.name}: {self.rows:,} rows, {self.experts} experts, {self.inputs} → {self.outputs}"


DIRECTIONS = ("forward", "input_gradient", "weight_gradient")


def run(bench: Bench, *usually: str) -> list[Figure]:
    config = bench.config(*(usually or tax.usual(bench)))
    precision = config.precision
    if precision.fp8 is None:
        precision = bench.config("precision=fp8_deepseek", without=["precision"]).precision
    figures = []
    for shape in shapes(config, bench.on_gpu):
        try:
            figures += _grouped(bench, shape, precision)
        except torch.OutOfMemoryError:
            figures.append(not_measured(bench.suite, "grouped", "share", "out of memory", shape.said))
    return figures + _rounding(bench, shapes(config, bench.on_gpu)[-2], precision)


def shapes(config: RunConfig, on_gpu: bool) -> list[Shape]:
    """The two products of the model's experts, and on a GPU those of experts 2,048 wide. Raises UserError."""
    moe, hidden = experts_of(config), config.model.hidden_size
    tokens = (config.micro_batch_size or config.batch_size) * config.data.sequence_length
    sizes = [(config.model.name, tokens * moe.top_k, moe.num_experts, hidden, moe.moe_intermediate_size)]
    if on_gpu:
        sizes.append(("2,048-wide experts", 32_768, 32, 4096, 2048))
    return [
        shape
        for name, rows, experts, wide, width in sizes
        for shape in (
            Shape(f"{name} gate_up", rows, experts, wide, 2 * width),
            Shape(f"{name} down", rows, experts, width, wide),
        )
    ]


def ragged_ends(shape: Shape, device: torch.device) -> Tensor:
    """Where each expert's rows end: loads as uneven as a balanced router leaves them (a tenth to twice the mean)."""
    generator = torch.Generator().manual_seed(0)
    wanted = torch.rand(shape.experts, generator=generator) * 1.9 + 0.1
    ends = (wanted.cumsum(0) / wanted.sum() * shape.rows).round().to(torch.int32)
    return ends.to(device)


def call(multiply: Multiply, direction: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    """One direction of a grouped product alone."""
    x = torch.randn(shape.rows, shape.inputs, device=device).to(dtype)
    weight = torch.randn(shape.experts, shape.outputs, shape.inputs, device=device).to(dtype)
    ends = ragged_ends(shape, device)
    if direction == "forward":
        return lambda: multiply(x, weight, ends)
    wanted = (x if direction == "input_gradient" else weight).requires_grad_()
    out = multiply(x, weight, ends)
    gradient = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, wanted, gradient, retain_graph=True)


def dense(direction: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    """One product of as many FLOPs: all rows by one weight."""
    x = torch.randn(shape.rows, shape.inputs, device=device).to(dtype)
    weight = torch.randn(shape.outputs, shape.inputs, device=device).to(dtype)
    gradient = torch.randn(shape.rows, shape.outputs, device=device).to(dtype)
    products: dict[str, Call] = {
        "forward": lambda: torch.mm(x, weight.t()),
        "input_gradient": lambda: torch.mm(gradient, weight),
        "weight_gradient": lambda: torch.mm(gradient.t(), x),
    }
    return products[direction]


def _grouped(bench: Bench, shape: Shape, precision: PrecisionConfig) -> list[Figure]:
    device, dtype, suite = bench.runtime.device, bench.runtime.dtype, bench.suite
    peak = square_matmul_tflops(device, dtype)
    figures = []
    for direction in DIRECTIONS:
        arms = {
            kernel.name: call(kernel.make(precision, shape, device), direction, shape, device, dtype)
            for kernel in KERNELS
        }
        arms["dense"] = dense(direction, shape, device, dtype)
        seconds = _times(bench, arms)
        for kernel in KERNELS:
            took, of, name = seconds[kernel.name], shape.said, f"{kernel.name}_{direction}"
            share = estimate([shape.flops / s / 1e12 / peak for s in took])
            figures += [
                measured(suite, f"{name}_share_of_dense", paired(seconds["dense"], took), "share", of, kernel.note),
                measured(suite, f"{name}_share_of_peak", share, "share", of),
            ]
    return figures


def _rounding(bench: Bench, shape: Shape, precision: PrecisionConfig) -> list[Figure]:
    """What enters the experts and their weights, rounded by a step's own backend, beside the bandwidth of a copy."""
    assert precision.fp8 is not None
    device, dtype = bench.runtime.device, bench.runtime.dtype
    choice, operands = choose(precision, Device.of(device), {shape.inputs, shape.outputs}), precision.fp8.forward
    x = torch.randn(shape.rows, shape.inputs, device=device).to(dtype)
    weight, ends = torch.randn(shape.experts, shape.outputs, shape.inputs, device=device), ragged_ends(shape, device)
    cases: dict[str, tuple[Tensor, OperandConfig, Callable[[], tuple[Rows | Weights | None, Any]]]] = {
        "activation": (
            *(x, operands.activation),
            lambda: choice.backend.quantize(x, ends, rows=operands.activation, columns=None),
        ),
        "weight": (*(weight, operands.weight), lambda: choice.backend.round_weights(weight, operands.weight, None)),
    }
    copy, copied = copying(device)
    figures = []
    for name, (tensor, operand, rounded) in cases.items():
        made, _ = rounded()
        assert made is not None
        moved = tensor.nbytes + made.values.nbytes + made.scales.nbytes
        seconds = _times(bench, {"round": rounded, "copy": copy})
        share = paired(seconds["copy"], seconds["round"], moved / copied)
        of = f"{operand.format} a {operand.scale_of}, {' × '.join(map(str, tensor.shape))}, {choice.backend.name}"
        figures.append(measured(bench.suite, f"quantize_{name}_share_of_copy", share, "share", of))
    return figures


def _times(bench: Bench, arms: dict[str, Call]) -> dict[str, list[float]]:
    effort = bench.effort
    return interleaved(
        arms,
        bench.runtime.device,
        rounds=effort.rounds,
        budget_seconds=effort.budget_seconds / 10,
        shortest_seconds=effort.shortest_seconds,
    )
