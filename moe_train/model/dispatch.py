"""How tokens reach experts: dropless, sorted by expert, with gathers in both directions.

Every token is copied once per chosen expert and the copies are sorted by expert, so that one grouped matmul serves all
of them. Sorting is a permutation, so its backward is a gather by the inverse permutation; left to autograd it would be
an atomic scatter, slower and in an order that changes from run to run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Plan(NamedTuple):
    """Which token-expert pair stands where. Pair p = token · k + choice; n = t · k pairs."""

    pair_n: Tensor  # int64: the pair at each sorted place
    place_n: Tensor  # int64: the sorted place of each pair, the inverse of pair_n
    ends_e: Tensor  # int32: where each expert's run of places ends
    counts_e: Tensor  # int64: how many tokens each expert got, padding left out


def plan(expert_tk: Tensor, real_t: Tensor, num_experts: int) -> Plan:
    """Sort the pairs by expert; ties keep the order of tokens, so the result is the same on every run. No host sync.

    real_t: False for padding, which goes through its experts like the rest but is not counted as their load.
    """
    sorted_n, pair_n = expert_tk.flatten().sort(stable=True)
    place_n = torch.empty_like(pair_n)
    place_n[pair_n] = torch.arange(len(pair_n), device=pair_n.device)
    experts = torch.arange(num_experts, device=pair_n.device, dtype=sorted_n.dtype)
    ends_e = torch.searchsorted(sorted_n, experts, right=True)
    real_n = real_t[pair_n // expert_tk.shape[1]]
    counted_upto = F.pad(real_n.cumsum(0), (1, 0))
    counts_e = torch.diff(counted_upto[ends_e], prepend=counted_upto[:1])
    return Plan(pair_n, place_n, ends_e.to(torch.int32), counts_e)


class _Gather(torch.autograd.Function):
    """Rows of x at `index`; the backward gathers by `inverse` and sums the `copies` of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = grad_outputs[0].index_select(0, inverse)
        if ctx.copies > 1:
            grad = grad.unflatten(0, (-1, ctx.copies)).sum(1)
        return grad, None, None, None


def to_experts(x_td: Tensor, plan: Plan, top_k: int) -> Tensor:
    """Each token's row once per chosen expert, sorted by expert: (n, d)."""
    out: Tensor = _Gather.apply(x_td, plan.pair_n // top_k, plan.place_n, top_k)  # type: ignore[no-untyped-call]
    return out


def gates_to_experts(gate_tk: Tensor, plan: Plan) -> Tensor:
    """The gate value of each sorted place: (n, 1)."""
    out: Tensor = _Gather.apply(gate_tk.reshape(-1, 1), plan.pair_n, plan.place_n, 1)  # type: ignore[no-untyped-call]
    return out


def from_experts(y_nd: Tensor, plan: Plan, top_k: int) -> Tensor:
    """Sum the rows of each token's experts back into its place: (t, d)."""
    back: Tensor = _Gather.apply(y_nd, plan.place_n, plan.pair_n, 1)  # type: ignore[no-untyped-call]
    summed: Tensor = back.unflatten(0, (-1, top_k)).sum(1)
    return summed
