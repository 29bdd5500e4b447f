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


_Key = tuple[tuple[int, ...], torch.dtype]


class Narrowed:
    """The weights of one model, which nothing changes within `held`."""

    def __init__(self) -> None:
        self._wanted: dict[_Key, tuple[Tensor, ...]] = {}  # which also keeps the ids those of these weights
        self._made: dict[_Key, Tensor] = {}

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
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for key, weights in self._wanted.items():
            made, parts = _room(weights, key[1])
            self._made[key] = made
            by_dtype[key[1]][0].extend(parts)
            by_dtype[key[1]][1].extend(weights)
        for parts, of in by_dtype.values():
            torch._foreach_copy_(parts, of)

    def of(self, weights: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """As `narrowed`, made if it is not there yet, and known from then on."""
        key = tuple(map(id, weights)), dtype
        if key not in self._made:
            made = _alone(weights, dtype)
            known = sum(weight.numel() for wanted in self._wanted.values() for weight in wanted)
            if known + made.numel() > _MOST:
                return made
            self._wanted[key], self._made[key] = weights, made
        return self._made[key]


def _room(weights: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """For all of them, one below the other, and of it each one's part."""
    rows = [len(weight) for weight in weights]
    made = torch.empty((sum(rows), *weights[0].shape[1:]), dtype=dtype, device=weights[0].device)
    return made, list(made.split(rows))


def _alone(weights: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    return weights[0].to(dtype) if len(weights) == 1 else torch.cat([weight.to(dtype) for weight in weights])


def narrowed(dtype: torch.dtype, *weights: Tensor) -> Tensor:
    """The weight in `dtype`, or several one below the other, for an autograd function that gives gradients itself."""
    if _held is None or torch.compiler.is_compiling() or all(weight.dtype == dtype for weight in weights):
        return _alone(weights, dtype)
    return _held.of(weights, dtype)
