"""What multiplies in FP8: the interface of a backend."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from moe_train.config import OperandConfig
from moe_train.kernels.layouts import Columns, Rows, Weights

Rate = Literal["float32", "bfloat16", "float8"]


class ByToken(Protocol):
    """What a backend does with rows that it reads where they lie: row i of an operand is row source_n[i] (int64)."""

    def quantize(
        self,
        x_tk: Tensor,
        source_n: Tensor,
        ends_e: Tensor,
        *,
        rows: OperandConfig | None,
        columns: OperandConfig | None,
    ) -> tuple[Rows | None, Columns | None]:
        """As a backend's, of the rows x[source_n]."""

    def quantize_again(self, rows: Rows, source_n: Tensor, ends_e: Tensor, columns: OperandConfig) -> Columns:
        """As a backend's, of those rows."""

    def product(self, left: Rows, right: Weights, ends_e: Tensor, dtype: torch.dtype, source_n: Tensor) -> Tensor:
        """As a backend's, of those rows."""

    def collect(self, y_nd: Tensor, place_tk: Tensor) -> Tensor:
        """For each token the sum of the rows at its places, (t, d)."""


class Backend(Protocol):
    """Rounds operands and multiplies them; kernels/layouts.py says how they lie in memory.

    Rows of group e of a tensor of n rows end before `ends_e[e]` (int32, on its device). No scale is shared by groups.
    """

    name: str
    multiplies_in: Rate  # whose peak rate its products could have
    asks_host: bool  # for the sizes of groups, which no CUDA graph can
    by_token: ByToken | None  # None: a token's row is copied for each of its experts

    def quantize(
        self,
        x_nk: Tensor,
        ends_e: Tensor,
        *,
        rows: OperandConfig | None,
        columns: OperandConfig | None,
    ) -> tuple[Rows | None, Columns | None]:
        """x (n, k), rounded along k, along the tokens of each group, or both."""

    def quantize_again(self, rows: Rows, ends_e: Tensor, columns: OperandConfig) -> Columns:
        """What was rounded along k, rounded again along tokens."""

    def dequantize(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """What was rounded along k, (n, k) in a wide format."""

    def round_weights(
        self, weight_eoi: Tensor, forward: OperandConfig | None, backward: OperandConfig | None
    ) -> tuple[Weights | None, Weights | None]:
        """w (e, o, i) for the forward product, and its transpose (e, i, o) for that of the input gradient."""

    def product(self, left: Rows, right: Weights, ends_e: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows (n, k) of group e times weight e (o, k) transposed → (n, o); zeros after the last group."""

    def weight_product(self, left: Columns, right: Columns) -> Tensor:
        """For each group, left (o, tokens) times right (i, tokens) transposed → (e, o, i) in FP32."""

    def swiglu(
        self,
        gate_up: Tensor,
        row_weight: Tensor | None,
        ends_e: Tensor,
        rows: OperandConfig,
    ) -> Rows:
        """silu(gate) · up · row_weight of gate_up (n, 2f), in its format, then rounded along f as `quantize` does."""

    def swiglu_backward(
        self,
        grad_h: Tensor,
        gate_up: Tensor,
        row_weight: Tensor | None,
        ends_e: Tensor,
        *,
        rows: OperandConfig | None,
        columns: OperandConfig | None,
    ) -> tuple[Rows | None, Columns | None, Tensor | None]:
        """The gradient of gate_up, rounded, and that of the rows' weights (n, 1)."""
