"""How well FP8 holds the operands of each layer: what is counted on logged steps, and the rates it comes to.

An operand in wide format is x, in FP8 it is q with a scale s. Over everything that belongs to a group are counted

    underflow    x is finite and not zero, q is zero: the number is lost
    saturation   x / s is beyond the format's largest value by more than half a step: the number was cut off
    non-finite   q is infinite or NaN: x was (an overflow, upstream), or the cast made it so

What they can show: a scale of the moment maps the largest magnitude of its piece onto the format's largest value, so
nothing is ever cut off, and a saturation above zero says that a backend's scales are not those of the moment. A piece
whose range is too wide shows as underflow: what is 458,752 times smaller than the largest of its piece is zero in E4M3,
7.5e9 times smaller in E5M2. The share of a piece that lies at the largest value says nothing and is not counted.

Underflow and saturation are shares of the finite numbers that are not zero, non-finite of all. An operand that is
rounded twice (for two products; again, with recomputed activations) is counted twice, and the shares stay shares.
Counts are sums on the device, over micro-batches, experts and ranks; reading them is what waits for it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from moe_train.kernels.layouts import PIECE, Columns, Rows, Weights

if TYPE_CHECKING:
    from moe_train.precision.fp8 import Fp8Layer

Operand = Literal["input", "weight", "gradient", "swiglu_input"]
OPERANDS: tuple[Operand, ...] = ("input", "weight", "gradient", "swiglu_input")  # the last: as a recipe keeps it
_NONZERO, _UNDERFLOW, _SATURATED, _ALL, _NONFINITE = range(5)


class Rates(NamedTuple):
    """Of one operand of one layer."""

    underflow_rate: float
    saturation_rate: float
    nonfinite_rate: float


LayerRates = dict[str, dict[Operand, Rates]]  # by name of the layer; an operand of which nothing was counted is absent


class Counts:
    """Of all layers of a model, by name. They count nothing outside of `counting`."""

    def __init__(self, layers: dict[str, Fp8Layer], device: torch.device) -> None:
        self.layers = layers
        self._shape = (len(layers), len(OPERANDS), 5)
        self._counts = torch.zeros(self._shape, dtype=torch.float64, device=device)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """What the layers round in here is counted."""
        for layer, counts in zip(self.layers.values(), self._counts.unbind(), strict=True):
            layer.counts = counts
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.counts = None

    def take(self) -> Tensor:
        """The counts since the last call, a vector on the device, to be summed over ranks and read by `rates`."""
        taken = self._counts.flatten().clone()
        self._counts.zero_()
        return taken

    def rates(self, taken: Tensor) -> LayerRates:
        """Waits for the device."""
        found: LayerRates = {}
        for name, by_operand in zip(self.layers, taken.view(self._shape).tolist(), strict=True):
            found[name] = {
                operand: Rates(
                    counts[_UNDERFLOW] / max(1.0, counts[_NONZERO]),
                    counts[_SATURATED] / max(1.0, counts[_NONZERO]),
                    counts[_NONFINITE] / counts[_ALL],
                )
                for operand, counts in zip(OPERANDS, by_operand, strict=True)
                if counts[_ALL]
            }
        return found


def count_rows(into: Tensor, operand: Operand, x_nk: Tensor, rows: Rows, ends_e: Tensor) -> None:
    """x (n, k) beside its form along k; rows after the last group are left out, as no product reads them."""
    _count(into, operand, x_nk, rows.values, _by_value(rows.scales, x_nk.shape[-1]), _in_a_group(x_nk, ends_e))


def count_columns(into: Tensor, operand: Operand, x_nk: Tensor, columns: Columns, ends_e: Tensor) -> None:
    """x (n, k) beside its form along tokens, which is brought into the order of x."""
    at = torch.arange(len(x_nk), device=x_nk.device)
    group = torch.searchsorted(ends_e, at, right=True).clamp_max(len(ends_e) - 1)
    start, first_piece = (torch.cat([ends.new_zeros(1), ends[:-1]]) for ends in (ends_e, columns.ends_e))
    place = (first_piece[group] * PIECE + at - start[group]).clamp_max(columns.values.shape[1] - 1)
    values = columns.values.view(torch.uint8)[:, place].mT.view(
        columns.values.dtype
    )  # FP8 cannot be indexed everywhere
    _count(into, operand, x_nk, values, columns.scales[:, place // PIECE].mT, _in_a_group(x_nk, ends_e))


def count_weights(into: Tensor, w_eoi: Tensor, weights: Weights) -> None:
    _count(into, "weight", w_eoi, weights.values, _by_value(weights.scales, w_eoi.shape[-1]), None)


def _by_value(scales: Tensor, inner: int) -> Tensor:
    return scales.repeat_interleave(PIECE, -1)[..., :inner]


def _in_a_group(x_nk: Tensor, ends_e: Tensor) -> Tensor:
    return (torch.arange(len(x_nk), device=x_nk.device) < ends_e[-1]).unsqueeze(1)


def _count(into: Tensor, operand: Operand, x: Tensor, values: Tensor, scales: Tensor, real: Tensor | None) -> None:
    """`scales`: of each value. `real`: False for what is not there; None: all is."""
    magnitude = x.detach().to(torch.float32).abs()
    stored = values.to(torch.float32)
    there = torch.ones_like(magnitude, dtype=torch.bool) if real is None else real.expand_as(magnitude)
    nonzero = there & magnitude.isfinite() & (magnitude > 0)
    found = (
        nonzero,
        nonzero & (stored == 0),
        nonzero & (magnitude > scales * _cut_off_beyond(values.dtype)),
        there,
        there & ~stored.isfinite(),
    )
    into[OPERANDS.index(operand)] += torch.stack([each.sum() for each in found])


def _cut_off_beyond(dtype: torch.dtype) -> float:
    """The largest value and half a step of those next to it: what would be rounded further up if there were more."""
    format = torch.finfo(dtype)
    return float(format.max) + float(format.eps) * 2.0 ** math.floor(math.log2(format.max)) / 2
