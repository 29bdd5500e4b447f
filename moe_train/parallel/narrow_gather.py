"""Weights that are read in BF16 alone are gathered in BF16: half the bytes, and the same numbers.

fully_shard's own mixed precision would round everything that a block has, norms and routers too, and leave gradients in
BF16. Here its groups stay in FP32, and what travels is rounded where the products would round it anyway: linear layers
outside an FP8 recipe, which rounds what the master weights are. What travels together goes in one exchange.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather

from moe_train.model.experts import Experts
from moe_train.model.layers import Linear

# torch 2.13 renamed it, torch 2.11 knows the old name only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _managed(module: nn.Module, seen: set[nn.Module]) -> Iterator[nn.Module]:
    seen.add(module)
    for child in module.children():
        if child not in seen and not isinstance(child, FSDPModule):
            yield from _managed(child, seen)
    yield module  # after its children, as fully_shard has it


class NarrowGather(AllGather):
    """Of a group, parameters of some `names`: numbers that a process has of each, padding included; which in BF16."""

    def __init__(self, names: Sequence[str], sizes: Sequence[int], narrow: Sequence[bool]) -> None:
        self.names, self._sizes, self._narrow = list(names), list(sizes), list(narrow)
        self.held: list[Tensor] | None = None  # what this process has of them, for the first call to compare

    @classmethod
    def of_group(cls, module: nn.Module, model: nn.Module, processes: int) -> Self | None:
        """Of what fully_shard will take for `module`, cut over `processes`, under its names in `model`.

        None: all of it is read in FP32.
        """
        names = {weight: name for name, weight in model.named_parameters()}
        narrow: dict[nn.Parameter, bool] = {}
        for each in _managed(module, set()):
            for weight in each.parameters(recurse=False):
                narrow.setdefault(weight, isinstance(each, Linear | Experts) and each.fp8 is None)
        sizes = [-(-len(weight) // processes) * weight[0].numel() for weight in narrow]
        in_order = [names[weight] for weight in narrow]
        return cls(in_order, sizes, list(narrow.values())) if any(narrow.values()) else None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        if async_op or input_tensor.numel() != sum(self._sizes) or input_tensor.dtype != torch.float32:
            raise RuntimeError("fully_shard gathers otherwise than parallel/narrow_gather.py knows")
        pieces = input_tensor.split(self._sizes)
        self._check(pieces)
        wide, narrow = (self._chosen(pieces, which) for which in (False, True))
        leaving = torch.cat([*(each.view(torch.uint8) for each in wide), *(_rounded(each) for each in narrow)])
        arriving = leaving.new_empty(group.size() * len(leaving))
        _all_gather(arriving, leaving, group=group)
        wide_bytes = 4 * sum(map(len, wide))
        of_wide, of_narrow = arriving.view(group.size(), -1).tensor_split([wide_bytes], dim=1)
        whole = output_tensor.view(group.size(), -1).split(self._sizes, dim=1)
        for which, received, dtype, own in (
            (False, of_wide, torch.float32, wide),
            (True, of_narrow, torch.bfloat16, narrow),
        ):
            if own:
                numbers = received.contiguous().view(dtype).split([len(each) for each in own], dim=1)
                torch._foreach_copy_(self._chosen(whole, which), list(numbers))

    def _chosen(self, pieces: Sequence[Tensor], narrow: bool) -> list[Tensor]:
        return [piece for piece, each in zip(pieces, self._narrow, strict=True) if each == narrow]

    def _check(self, pieces: Sequence[Tensor]) -> None:
        """Once: that the group has the order that was foretold."""
        if self.held is not None:
            for piece, local in zip(pieces, self.held, strict=True):
                if not torch.equal(piece[: local.numel()], local.flatten()):
                    raise RuntimeError("fully_shard gathers in another order than parallel/narrow_gather.py knows")
            self.held = None


def _rounded(piece: Tensor) -> Tensor:
    return piece.to(torch.bfloat16).view(torch.uint8)
