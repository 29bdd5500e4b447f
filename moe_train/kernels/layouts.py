"""How operands of FP8 products lie in memory, for every way of sharing scales and every backend.

A product sums over its inner dimension in pieces of 128. Whatever a recipe's scales are shared over, an operand has one
for each of its rows and each piece: what is shared is written several times (4 bytes for 128 values). So a kernel has
one way to read it.

Tokens come in groups (an expert's rows), which end where `ends_e` says, on the device. Where tokens are the inner
dimension, each group starts at a piece of its own and its last piece is filled with zeros. How many pieces that makes
is known on the device alone; there is room for `pieces_at_most`, and what follows the last one is never read.

    n rows of all groups, k inner, e groups, o outputs, i inputs, p pieces
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PIECE = 128
DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class Rows(NamedTuple):
    """Tokens as rows: values (n, k) in FP8, scales (n, ⌈k / 128⌉) in FP32."""

    values: Tensor
    scales: Tensor


class Columns(NamedTuple):
    """Tokens as the inner dimension: values (k, 128 p) in FP8, scales (k, p) in FP32; group e ends at piece ends_e.

    The kernels write the scales of a piece side by side, as they are read together.
    """

    values: Tensor
    scales: Tensor
    ends_e: Tensor


class Weights(NamedTuple):
    """One matrix a group: values (e, o, k) in FP8, scales (e, o, ⌈k / 128⌉) in FP32; views of any stride.

    `shared_rows`: every 128 rows, counted from the first, have the same scales.
    """

    values: Tensor
    scales: Tensor
    shared_rows: bool


def pieces_at_most(rows: int, groups: int) -> int:
    """The most pieces that `rows` tokens in `groups` can take: each group may have one that is not full."""
    return rows // PIECE + min(rows, groups)


def piece_ends(ends_e: Tensor) -> Tensor:
    """Where each group ends, counted in pieces (int32, on the device)."""
    sizes = ends_e.diff(prepend=ends_e.new_zeros(1))
    return ((sizes + PIECE - 1) // PIECE).cumsum(0, dtype=torch.int32)
