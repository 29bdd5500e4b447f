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

from moe_train.kernels.cpu import fp8 as compiled
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
    if compiled.counts(x_nk):
        _add_compiled(into, operand, x_nk, rows, ends_e)
        return
    real_n = torch.arange(len(x_nk), device=x_nk.device) < ends_e[-1]
    _add(into, operand, x_nk, real_n, _by_value(rows.scales, x_nk.shape[-1]), rows.values, real_n)


def count_columns(into: Tensor, operand: Operand, x_nk: Tensor, columns: Columns, ends_e: Tensor) -> None:
    """x (n, k) beside its form along tokens, which has places for more of them."""
    if compiled.counts(x_nk):
        _add_compiled(into, operand, x_nk, columns, ends_e)
        return
    token = torch.arange(len(x_nk), device=x_nk.device)
    group = torch.searchsorted(ends_e, token, right=True).clamp_max(len(ends_e) - 1)
    start, first_piece = (torch.cat([ends.new_zeros(1), ends[:-1]]) for ends in (ends_e, columns.ends_e))
    piece = (first_piece[group] + (token - start[group]) // PIECE).clamp_max(columns.scales.shape[1] - 1)
    place = torch.arange(columns.values.shape[1], device=x_nk.device)
    real_n, real_place = token < ends_e[-1], place < columns.ends_e[-1] * PIECE
    _add(into, operand, x_nk, real_n, columns.scales[:, piece].mT, columns.values.mT, real_place)


def count_weights(into: Tensor, w_eoi: Tensor, weights: Weights) -> None:
    real = torch.ones(w_eoi.shape[:-1], dtype=torch.bool, device=w_eoi.device)
    _add(into, "weight", w_eoi, real, _by_value(weights.scales, w_eoi.shape[-1]), weights.values, real)


def _by_value(scales: Tensor, inner: int) -> Tensor:
    return scales.repeat_interleave(PIECE, -1)[..., :inner]


def _add(
    into: Tensor, operand: Operand, x: Tensor, real: Tensor, scales: Tensor, values: Tensor, real_values: Tensor
) -> None:
    """x (…, k) with the scale of each number; values (…, k) in FP8, of as many rows or more, those beyond x zeros.

    `real`, `real_values`: False for rows that are not there. What is zero stays zero, and what is not finite is stored
    as such: so numbers of x and of values need not be brought together to be counted.
    """

    def counted(what: Tensor, rows: Tensor) -> Tensor:
        return (torch.count_nonzero(what, -1) * rows).sum()

    magnitude, bits = x.detach().abs(), values.view(torch.uint8) & 0x7F  # without the sign
    nonzero, stored = counted(magnitude, real), counted(bits, real_values)
    not_finite = counted(bits >= (0x7F if values.dtype == torch.float8_e4m3fn else 0x7C), real_values)
    beyond = (magnitude > scales * _cut_off_beyond(values.dtype)) & (magnitude < math.inf)
    saturated, all_of_them = counted(beyond, real), real.sum() * x.shape[-1]
    into[OPERANDS.index(operand)] += torch.stack(
        [nonzero - not_finite, nonzero - stored, saturated, all_of_them, not_finite]
    )


def _add_compiled(into: Tensor, operand: Operand, x_nk: Tensor, rounded: Rows | Columns, ends_e: Tensor) -> None:
    """The same of x (n, k) by the kernel in C."""
    nonzero, stored, not_finite, saturated = compiled.count(x_nk.detach(), rounded, ends_e)
    found = [nonzero - not_finite, nonzero - stored, saturated, int(ends_e[-1]) * x_nk.shape[1], not_finite]
    into[OPERANDS.index(operand)] += torch.tensor(found, dtype=into.dtype)


def _cut_off_beyond(dtype: torch.dtype) -> float:
    """The largest value and half a step of those next to it: what would be rounded further up if there were more."""
    format = torch.finfo(dtype)
    return float(format.max) + float(format.eps) * 2.0 ** math.floor(math.log2(format.max)) / 2
