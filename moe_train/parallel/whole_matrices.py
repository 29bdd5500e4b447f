"""Matrices that are cut by rows over processes, whole on one of them each while something is done to them.

Muon's iteration mixes all entries of a matrix. Gathered on every process it would be done as many times over; instead
the k-th matrix of a batch goes to process k mod p, which does it, and its rows go back: two all-to-alls a batch, and
the work is shared out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.parallel.communication import labelled


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
