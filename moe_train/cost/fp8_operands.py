"""Bytes of what FP8 layers keep: one a value, and an FP32 scale for every 128 values of a row (kernels/layouts.py).

A layer keeps its input until the backward pass, and of its weight one form for the forward product and one, transposed,
for the gradient of the input, both for the length of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

Direction = Literal["forward", "input_gradient"]
PIECE, SCALE_BYTES = 128, 4


def rows_bytes(rows: float, inner: int) -> float:
    """Of `rows` rows of `inner` values each."""
    return rows * (inner + SCALE_BYTES * math.ceil(inner / PIECE))


def weight_bytes(matrices: Iterable[tuple[int, int, int]], directions: Iterable[Direction]) -> float:
    """Of (how many matrices, outputs, inputs), in each of `directions`."""
    of_both = [
        {"forward": count * rows_bytes(outputs, inputs), "input_gradient": count * rows_bytes(inputs, outputs)}
        for count, outputs, inputs in matrices
    ]
    return sum(size[direction] for size in of_both for direction in directions)
