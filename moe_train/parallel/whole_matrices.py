"""What is done to whole matrices, shared out among processes: each does some, whether they are cut or copies.

Muon's iteration mixes all entries of a matrix. Of matrices that are cut by rows, the k-th of a batch goes to process
k mod p, which does it, and its rows go back: two all-to-alls a batch. Of copies, each process does its p-th part of the
batch and all gather the results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.parallel.communication import labelled

# torch 2.13 renamed it, torch 2.11 knows the old name only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class WholeMatrices:
    """`shapes`: the (rows, columns) of each matrix that `group` has cut, by what this process holds of it."""

    def __init__(self, group: dist.ProcessGroup, shapes: Mapping[Tensor, torch.Size]) -> None:
        self.group, self.shapes = group, dict(shapes)
        self.parts, self.part = dist.get_world_size(group), dist.get_rank(group)

    def __contains__(self, local: Tensor) -> bool:
        return local in self.shapes

    def done_whole(self, function: Callable[[Tensor], Tensor], pieces: Tensor, rows: int) -> Tensor:
        """`function` of matrices (N, rows, columns), of which each process gives and gets its rows (N, own, columns).

        `function` gets some of the matrices, none perhaps, and keeps their shape. All processes call it.
        """
        most = -(-rows // self.parts)  # as torch's chunk: the last processes may have fewer, or none
        own = [max(0, min(most, rows - part * most)) for part in range(self.parts)]
        count, _, columns = pieces.shape
        mine = len(range(self.part, count, self.parts))
        # By the process that does them.
        order = [k for part in range(self.parts) for k in range(part, count, self.parts)]
        sizes = [len(range(part, count, self.parts)) * own[self.part] * columns for part in range(self.parts)]
        arriving = [mine * own[part] * columns for part in range(self.parts)]
        order_n = torch.tensor(order, device=pieces.device)

        received = pieces.new_empty(sum(arriving))
        with labelled("whole_matrices"):
            dist.all_to_all_single(received, pieces[order_n].flatten(), arriving, sizes, group=self.group)
        parts = [part.view(mine, number, columns) for part, number in zip(received.split(arriving), own, strict=True)]
        whole = function(torch.cat(parts, dim=1))
        back = torch.cat([part.flatten() for part in whole.split(own, dim=1)])
        returned = torch.empty_like(pieces)
        out = pieces.new_empty(pieces.numel())
        with labelled("whole_matrices"):
            dist.all_to_all_single(out, back, sizes, arriving, group=self.group)
        returned[order_n] = out.view_as(pieces)
        return returned


class Copies:
    """`groups`: the processes that have the same matrices as this one, by what this one holds."""

    def __init__(self, groups: Mapping[Tensor, dist.ProcessGroup]) -> None:
        self.groups = {local: group for local, group in groups.items() if dist.get_world_size(group) > 1}

    def done_once(
        self, function: Callable[[Tensor], Tensor], matrices: Tensor, group: dist.ProcessGroup | None
    ) -> Tensor:
        """`function` of matrices (N, rows, columns) that all of the group have, and call this for.

        `function` gets some of the matrices, none perhaps, and keeps their shape.
        """
        if group is None:
            return function(matrices)
        parts, count = dist.get_world_size(group), len(matrices)
        most = -(-count // parts)
        mine = function(matrices[most * dist.get_rank(group) :][:most])
        leaving = mine.new_zeros(most, *matrices.shape[1:])
        leaving[: len(mine)] = mine
        done = mine.new_empty(most * parts, *matrices.shape[1:])
        with labelled("whole_matrices"):
            _all_gather(done, leaving, group=group)
        return done[:count]
