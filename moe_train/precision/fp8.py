"""Linear layers in FP8: all three products of a layer, forward and backward, as a recipe says.

    forward          y  (t, o) = x  (t, i) · w  (o, i)ᵀ     sums over the inputs i
    input gradient   dx (t, i) = dy (t, o) · wᵀ (i, o)ᵀ     sums over the outputs o
    weight gradient  dw (o, i) = dyᵀ (o, t) · xᵀ (i, t)ᵀ    sums over the tokens t

What is kept of an input until the backward pass is its FP8 form, from which the weight gradient's operand is rounded
again, as in DeepSeek-V3 (arXiv 2412.19437, section 3.3.3); of an input that is itself made again, such as a norm's
result, nothing is (precision/remade.py). Weights are rounded once a step, whatever the number of
micro-batches: inside `holding_weights`, which ends before the optimizer changes them. A tensor's version counter would
not do: torch's fused AdamW leaves it as it is. In a grouped product every group is a product of its own.

Here is what a layer rounds; the operators that multiply are in fp8_linear.py and fp8_swiglu.py.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from moe_train.config import Fp8Config, OperandConfig
from moe_train.kernels import reference
from moe_train.kernels.layouts import DTYPES, PIECE, Columns, Rows, Weights
from moe_train.precision import health
from moe_train.precision.backends import Backend, ByToken
from moe_train.precision.remade import remade_with
from moe_train.uncompiled import operator

_held: object | None = None  # the step in progress, while weights cannot change
_layers: WeakValueDictionary[int, Fp8Layer] = WeakValueDictionary()  # operators take numbers, not objects
_keys = itertools.count()


@contextlib.contextmanager
def holding_weights() -> Iterator[None]:
    """Nothing in here changes a weight: each is rounded once."""
    global _held
    _held = object()
    try:
        yield
    finally:
        _held = None
        for layer in _layers.values():
            layer.let_go()


class Fp8Layer:
    """The products of one layer, by a recipe as it is for that layer (precision/recipes.py)."""

    def __init__(self, recipe: Fp8Config, backend: Backend) -> None:
        self.recipe = recipe
        self.backend = backend
        self.counts: Tensor | None = None  # where what is rounded is counted now, see precision/health.py
        self._weights: tuple[Weights | None, Weights | None] = (None, None)
        self.key = next(_keys)
        _layers[self.key] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Fp8Layer:
        """A copied model's layer is another layer: its weights will differ."""
        return Fp8Layer(self.recipe, self.backend)

    @property
    def reads_tokens(self) -> bool:
        """Whether inputs can be read by an index: there is a way to, and none shares a scale with others."""
        alone = self.recipe.forward.activation.scale_of in ("tile", "row")
        return alone and self.backend.by_token is not None

    @property
    def by_token(self) -> ByToken:
        """For rows at source_n, which are given where `reads_tokens` alone."""
        assert self.backend.by_token is not None
        return self.backend.by_token

    def input(self, x_ni: Tensor, ends_e: Tensor | None, source_n: Tensor | None = None) -> Rows:
        """x in the compute format as the forward product takes it, and as it is kept, unless x itself is made again.

        source_n: which row of x each row in groups is; each of x is rounded once.
        """
        kept_in = DTYPES[self.recipe.forward.activation.format]

        def rounded(x_ni: Tensor) -> tuple[Tensor, ...]:
            pair: tuple[Tensor, Tensor] = torch.ops.moe_train.fp8_input(x_ni, ends_e, source_n, self.key, kept_in)
            return pair

        return Rows(*remade_with(rounded, x_ni))

    def weights(self, weight_eoi: Tensor, *, backward: bool) -> Weights:
        """The weight as the forward product takes it, or its transpose for the input gradient."""
        forward, transposed = self.recipe.forward.weight, self.recipe.input_gradient.weight
        if _held is None:
            one = (None, transposed) if backward else (forward, None)
            rounded = self._round_weights(weight_eoi, *one)
        else:
            if self._weights[0] is None:
                self._weights = self._round_weights(weight_eoi, forward, transposed)
            rounded = self._weights
        chosen = rounded[backward]
        assert chosen is not None
        return chosen

    def _round_weights(
        self, weight_eoi: Tensor, forward: OperandConfig | None, transposed: OperandConfig | None
    ) -> tuple[Weights | None, Weights | None]:
        rounded = self.backend.round_weights(weight_eoi, forward, transposed)
        if self.counts is not None:
            for wide, narrow in zip((weight_eoi, weight_eoi.mT), rounded):
                if narrow is not None:
                    health.count_weights(self.counts, wide, narrow)
        return rounded

    def quantized_input(self, x_ni: Tensor, ends_e: Tensor | None, source_n: Tensor | None = None) -> Rows:
        """What `input` returns, made."""
        operand = self.recipe.forward.activation
        ends = ends_of(x_ni, ends_e if source_n is None else None)
        rows, _ = self.backend.quantize(x_ni, ends, rows=operand, columns=None)
        assert rows is not None
        if self.counts is not None:
            counted = (x_ni, rows) if source_n is None else (x_ni[source_n], _copied(rows, source_n))
            health.count_rows(self.counts, "input", *counted, ends_of(counted[0], ends_e))
        return rows

    def product(
        self, left: Rows, right: Weights, ends_e: Tensor, dtype: torch.dtype, source_n: Tensor | None
    ) -> Tensor:
        """The backend's, of all rows or those at source_n."""
        if source_n is None:
            return self.backend.product(left, right, ends_e, dtype)
        return self.by_token.product(left, right, ends_e, dtype, source_n)

    def along_tokens(self, kept: Rows, ends_e: Tensor, source_n: Tensor | None = None) -> Columns:
        """A kept input as the weight gradient takes it."""
        operand = self.recipe.weight_gradient.activation
        if source_n is None:
            columns = self.backend.quantize_again(kept, ends_e, operand)
        else:
            columns = self.by_token.quantize_again(kept, source_n, ends_e, operand)
        if self.counts is not None:
            wide = self.backend.dequantize(kept, torch.float32)
            wide = wide if source_n is None else wide[source_n]
            health.count_columns(self.counts, "input", wide, columns, ends_e)
        return columns

    def quantized_gradient(
        self, grad_no: Tensor, ends_e: Tensor, source_n: Tensor | None = None, *, rows: bool, columns: bool
    ) -> tuple[Rows | None, Columns | None]:
        """Of its output, as the input gradient and the weight gradient take it."""
        asked = {
            "rows": self.recipe.input_gradient.gradient if rows else None,
            "columns": self.recipe.weight_gradient.gradient if columns else None,
        }
        if source_n is None:
            straight, turned = self.backend.quantize(grad_no, ends_e, **asked)
        else:
            straight, turned = self.by_token.quantize(grad_no, source_n, ends_e, **asked)
        if self.counts is not None:
            grad_no = grad_no if source_n is None else grad_no[source_n]
            self._count_gradient(grad_no, straight, turned, ends_e)
        return straight, turned

    def _count_gradient(self, grad_no: Tensor, rows: Rows | None, columns: Columns | None, ends_e: Tensor) -> None:
        if self.counts is not None and rows is not None:
            health.count_rows(self.counts, "gradient", grad_no, rows, ends_e)
        if self.counts is not None and columns is not None:
            health.count_columns(self.counts, "gradient", grad_no, columns, ends_e)

    def swiglu(self, gate_up: Tensor, row_weight: Tensor | None, ends_e: Tensor) -> Rows:
        """The result of a SwiGLU as its input. The backend rounds it unseen: to be counted it is made once more."""
        rows = self.backend.swiglu(gate_up, row_weight, ends_e, self.recipe.forward.activation)
        if self.counts is not None:
            health.count_rows(self.counts, "input", reference.swiglu(gate_up, row_weight), rows, ends_e)
        return rows

    def swiglu_input(self, gate_up: Tensor, operand: OperandConfig, ends_e: Tensor) -> Rows:
        """Its output in front of a SwiGLU, as it is kept."""
        rows, _ = self.backend.quantize(gate_up, ends_e, rows=operand, columns=None)
        assert rows is not None
        if self.counts is not None:
            health.count_rows(self.counts, "swiglu_input", gate_up, rows, ends_e)
        return rows

    def swiglu_gradient(
        self,
        grad_h: Tensor,
        gate_up: Tensor,
        row_weight: Tensor | None,
        ends_e: Tensor,
        *,
        rows: bool,
        columns: bool,
    ) -> tuple[Rows | None, Columns | None, Tensor | None]:
        """Of its output in front of a SwiGLU, as `quantized_gradient`, and of the rows' weights."""
        straight, turned, grad_row_weight = self.backend.swiglu_backward(
            grad_h,
            gate_up,
            row_weight,
            ends_e,
            rows=self.recipe.input_gradient.gradient if rows else None,
            columns=self.recipe.weight_gradient.gradient if columns else None,
        )
        if self.counts is not None:
            grad_gate_up, _ = reference.swiglu_backward(grad_h, gate_up, row_weight)
            self._count_gradient(grad_gate_up, straight, turned, ends_e)
        return straight, turned, grad_row_weight

    def let_go(self) -> None:
        """Of rounded weights."""
        self._weights = (None, None)


@operator("moe_train::fp8_input")
def _input(
    x_ni: Tensor, ends_e: Tensor | None, source_n: Tensor | None, layer: int, kept_in: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Values and scales."""
    rows = layer_of(layer).quantized_input(x_ni, ends_e, source_n)
    return rows.values, rows.scales


@_input.register_fake
def _(
    x_ni: Tensor, ends_e: Tensor | None, source_n: Tensor | None, layer: int, kept_in: torch.dtype
) -> tuple[Tensor, Tensor]:
    rows, inner = x_ni.shape
    return (
        x_ni.new_empty(rows, inner, dtype=kept_in),
        x_ni.new_empty(rows, (inner + PIECE - 1) // PIECE, dtype=torch.float32),
    )


def owner_of(key: int) -> Fp8Layer | None:
    """For a graph to keep its layer alive; a number that torch.compile traces has none, and there the code keeps it."""
    return _layers.get(key) if isinstance(key, int) else None


def layer_of(key: int) -> Fp8Layer:
    return _layers[key]


def ends_of(rows: Tensor, ends_e: Tensor | None) -> Tensor:
    return torch.full((1,), len(rows), dtype=torch.int32, device=rows.device) if ends_e is None else ends_e


def _copied(rows: Rows, source_n: Tensor) -> Rows:
    values = rows.values.view(torch.uint8)[source_n].view(rows.values.dtype)  # torch cannot index FP8 everywhere
    return Rows(values, rows.scales[source_n])


def stacked(weight: Tensor) -> Tensor:
    return weight if weight.ndim == 3 else weight.unsqueeze(0)
