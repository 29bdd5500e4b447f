"""Weights as products read them, rounded from FP32: for a small model all at once and once a step.

A cast of 128 × 128 numbers takes 1.5 µs on an H200, 36 of them 57 µs of a step of 3 ms (docs/log.md), however little
there is to round. Which weights are asked for is learned in a first pass; the next ones begin with a launch for all.
Larger models round each where it is used: they notice no launch, and copies that live as long as a step would be seen.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

_MOST = 2**24  # numbers of all weights that are held, 32 MB

_held: Narrowed | None = None  # those of the step in progress


class Narrowed:
    """The weights of one model, which nothing changes within `held`."""

    def __init__(self) -> None:
        self._wanted: dict[tuple[int, torch.dtype], Tensor] = {}  # which also keeps the ids those of these weights
        self._made: dict[tuple[int, torch.dtype], Tensor] = {}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Around all passes of a step."""
        global _held
        _held = self
        self._make_all()
        try:
            yield
        finally:
            _held, self._made = None, {}

    @torch.no_grad()
    def _make_all(self) -> None:
        by_dtype: dict[torch.dtype, list[tuple[int, torch.dtype]]] = defaultdict(list)
        for key in self._wanted:
            by_dtype[key[1]].append(key)
        for dtype, keys in by_dtype.items():
            weights = [self._wanted[key] for key in keys]
            made = [torch.empty_like(weight, dtype=dtype) for weight in weights]
            torch._foreach_copy_(made, weights)
            self._made.update(zip(keys, made, strict=True))

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """As `narrowed`, made if it is not there yet, and known from then on."""
        key = (id(weight), dtype)
        if key not in self._made:
            made = weight.to(dtype)
            if sum(map(torch.numel, self._wanted.values())) + weight.numel() > _MOST:
                return made
            self._wanted[key], self._made[key] = weight, made
        return self._made[key]


def narrowed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, for an autograd function that gives its gradient itself."""
    if weight.dtype == dtype or _held is None or torch.compiler.is_compiling():
        return weight.to(dtype)
    return _held.of(weight, dtype)
