"""Results that are cheap to make again are not kept for the backward pass; what they were made from is.

A norm's result, a token's row once for each of its experts, and what products read of these in FP8 cost next to nothing
and are the largest tensors that products keep (DeepSeek-V3, arXiv 2412.19437, section 3.2.3, recomputes its norms).
Within `remaking`, whatever autograd would keep of a tensor that `remade` returned is replaced by the way to it. Both
passes compute the same numbers, and nothing that was decided in the first one (routing, dropout) is decided again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import SymInt, Tensor, UntypedStorage

from moe_train.precision.formats import compute_dtype

Function = Callable[..., tuple[Tensor, ...]]


@dataclass
class _Way:
    """To tensors that were not kept."""

    function: Function
    inputs: tuple[Tensor | _Kept, ...]
    uses: int = 0  # that are still to come
    made: tuple[Tensor, ...] | None = None

    def results(self) -> tuple[Tensor, ...]:
        made = self.made
        if made is None:
            made = self.function(*(each.tensor() if isinstance(each, _Kept) else each for each in self.inputs))
        self.uses -= 1
        self.made = made if self.uses > 0 else None
        return made


@dataclass(frozen=True)
class _Kept:
    """A view of a tensor that is made again."""

    way: _Way
    index: int  # among what the way leads to
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | SymInt

    def tensor(self) -> Tensor:
        with torch.no_grad():
            return self.way.results()[self.index].as_strided(self.shape, self.stride, self.offset)


class _Region:
    """The tensors that are made again, by the storage that their views share, while something else holds it."""

    def __init__(self) -> None:
        # None: kept as it is, by what made it.
        self.ways: WeakKeyDictionary[UntypedStorage, tuple[_Way, int] | None] = WeakKeyDictionary()

    def pack(self, tensor: Tensor) -> Tensor | _Kept:
        found = self.ways.get(tensor.untyped_storage())
        if found is None:
            return tensor
        way, index = found
        way.uses += 1
        return _Kept(way, index, tensor.shape, tensor.stride(), tensor.storage_offset())

    def add(self, results: tuple[Tensor, ...], function: Function, inputs: tuple[Tensor, ...]) -> None:
        if any(out.untyped_storage() is each.untyped_storage() for out in results for each in inputs):
            for view in results:
                self.ways.setdefault(view.untyped_storage(), None)
            return
        way = _Way(function, tuple(self.pack(each.detach()) for each in inputs))
        for index, out in enumerate(results):
            self.ways[out.untyped_storage()] = (way, index)


_region: _Region | None = None


@contextlib.contextmanager
def remaking(on: bool) -> Iterator[None]:
    """Within, what `remade` returns is made again rather than kept. Compiled code is left to the compiler's choice."""
    global _region
    if not on or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        yield
        return
    before, _region = _region, _Region()
    try:
        with torch.autograd.graph.saved_tensors_hooks(_region.pack, _unpack):
            yield
    finally:
        _region = before


def _unpack(kept: Tensor | _Kept) -> Tensor:
    return kept.tensor() if isinstance(kept, _Kept) else kept


def remade(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), which must give the same each time, whatever autocast says then, and be cheap.

    Inputs are taken to be kept or made again anyway, so where the result is a view of one there is nothing to do.
    """
    out = function(*inputs)
    made_again((out,), lambda *again: (function(*again),), *inputs)
    return out


def made_again(results: tuple[Tensor, ...], function: Function, *inputs: Tensor) -> None:
    """As `remade`, of what is there already and function(*inputs) gives as well."""
    if _region is not None and not torch.compiler.is_compiling():
        _region.add(results, function, inputs)


def in_compute_format(x: Tensor) -> Tensor:
    """As products read it, converted once for all of them."""
    dtype = compute_dtype(x)
    return x if x.dtype == dtype else remade(lambda wide: wide.to(dtype), x)


def remade_with(function: Function, x: Tensor) -> tuple[Tensor, ...]:
    """function(x), not differentiable: made again where x is, or is kept anyway, as `remade` says; else kept."""
    results = function(x.detach())
    if _region is not None and not torch.compiler.is_compiling() and x.untyped_storage() in _region.ways:
        _region.add(results, function, (x,))
    return results
