"""torch's collective operations (the library `c10d`): what each sends, and what it is for unless somebody says.

A process of p sends, by a ring, which is what bandwidth allows at best (Thakur et al., 2005, doi
10.1177/1094342005051521; NCCL and gloo do no better):

    all-gather, reduce-scatter   (p - 1)/p of what is whole
    all-reduce                   both, so twice that
    all-to-all                   what is for others
    broadcast, reduce, gather,   (p - 1)/p of what one process has: the mean over the processes, as all but one of
    scatter                      them send
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Collective(NamedTuple):
    argument: int  # where the tensors are that `times` is of
    times: float = 1.0  # of (p - 1)/p of their bytes
    kind: str = "other"


COLLECTIVES = {
    "_allgather_base_": Collective(0, kind="weights"),
    "allgather_into_tensor_coalesced_": Collective(0, kind="weights"),
    "allgather_": Collective(0),
    "allgather_coalesced_": Collective(0),
    "_reduce_scatter_base_": Collective(1, kind="gradients"),
    "reduce_scatter_tensor_coalesced_": Collective(1, kind="gradients"),
    "reduce_scatter_": Collective(1),
    "allreduce_": Collective(0, times=2.0),
    "allreduce_coalesced_": Collective(0, times=2.0),
    "alltoall_base_": Collective(1),
    "alltoall_": Collective(1),
    "broadcast_": Collective(0),
    "reduce_": Collective(0),
    "gather_": Collective(1),
    "scatter_": Collective(0),
    "barrier": Collective(0, times=0.0),
}


def sent_bytes(name: str, arguments: Sequence[Any], processes: int, rank: int) -> float:
    """By one of `processes`, for the arguments of the operation."""
    collective = COLLECTIVES[name]
    size = _nbytes(arguments[collective.argument])
    if name == "alltoall_base_" and (splits := arguments[4]):  # rows for each process; none given: equal parts
        own = splits[rank] / (sum(splits) or 1)
        return float(size * (1 - own))
    return size * collective.times * (processes - 1) / processes


def _nbytes(tensors: Tensor | Sequence[Any]) -> int:
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(_nbytes(each) for each in tensors)
