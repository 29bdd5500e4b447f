"""Results that are cheap to make again are not kept for the backward pass; what they were made from is.

A norm's result, and a token's row once for each of its experts, cost next to nothing and are the largest tensors that
products keep (DeepSeek-V3, arXiv 2412.19437, section 3.2.3, recomputes its norms). Within `remaking`, whatever autograd
would keep of a tensor that `remade` returned is replaced by the way to it. Both passes compute the same numbers, and
nothing that was decided in the first one (routing, dropout) is decided again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import SymInt, Tensor, UntypedStorage

Function = Callable[..., Tensor]


@dataclass
class _Way:
    """To a tensor that was not kept."""

    function: Function
    inputs: tuple[Tensor | _Kept, ...]
    uses: int = 0  # that are still to come
    made: Tensor | None = None

    def result(self) -> Tensor:
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
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | SymInt

    def tensor(self) -> Tensor:
        with torch.no_grad():
            return self.way.result().as_strided(self.shape, self.stride, self.offset)


class _Region:
    """The tensors that are made again, by the storage that their views share, while something else holds it."""

    def __init__(self) -> None:
        self.ways: WeakKeyDictionary[UntypedStorage, _Way] = WeakKeyDictionary()

    def pack(self, tensor: Tensor) -> Tensor | _Kept:
        way = self.ways.get(tensor.untyped_storage())
        if way is None:
            return tensor
        way.uses += 1
        return _Kept(way, tensor.shape, tensor.stride(), tensor.storage_offset())


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


def remade(function: Function, *inputs: Tensor) -> Tensor:
    """function(*inputs), which must give the same each time, whatever autocast says then, and be cheap."""
    out = function(*inputs)
    region, storage = _region, out.untyped_storage()
    if region is not None and all(storage is not each.untyped_storage() for each in inputs):
        region.ways[storage] = _Way(function, tuple(region.pack(each.detach()) for each in inputs))
    return out
