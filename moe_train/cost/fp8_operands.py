"""Bytes of what FP8 layers keep: one a value, and an FP32 scale for every 128 values of a row (kernels/layouts.py).

A layer keeps its input until the backward pass, and of its weight one form for the forward product and one, transposed,
for the gradient of the input, both for the length of a step. So it is with every recipe; in what the input of a SwiGLU
is kept is for the recipe to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from moe_train.config import Fp8Config

PIECE, SCALE_BYTES = 128, 4


@dataclass(frozen=True)
class Fp8Kept:
    """What is kept in FP8 of a step that multiplies in it, as far as recipes differ; by default as DeepSeek-V3 does."""

    swiglu_input: bool = True  # else it is kept in the compute format
    by_token: bool = True  # no scale is shared by several rows of an input: experts can read these by an index

    @classmethod
    def by(cls, recipe: Fp8Config | None) -> Fp8Kept | None:
        if recipe is None:
            return None
        by_token = recipe.forward.activation.scale_of in ("tile", "row")
        return cls(swiglu_input=recipe.swiglu_input is not None, by_token=by_token)


def rows_bytes(rows: float, inner: int) -> float:
    """Of `rows` rows of `inner` values each."""
    return rows * (inner + SCALE_BYTES * math.ceil(inner / PIECE))


def weight_bytes(matrices: Iterable[tuple[int, int, int]]) -> float:
    """Of (how many matrices, outputs, inputs), in the forms of both products."""
    return sum(
        count * (rows_bytes(outputs, inputs) + rows_bytes(inputs, outputs)) for count, outputs, inputs in matrices
    )
