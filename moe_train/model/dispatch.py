"""How tokens reach experts: dropless, sorted by expert, with gathers in both directions.

Every token is copied once per chosen expert and the copies are sorted by expert, so that one grouped matmul serves all
of them. Sorting is a permutation, so its backward is a gather by the inverse permutation; left to autograd it would be
an atomic scatter, slower and in an order that changes from run to run. A token's rows are summed as they are gathered
(torch's embedding bag): 12 ms instead of 36 for 4,096 tokens of 6 rows of 256 on two cores. On an H200 the bag took
seven times as long as reading the rows does (1.51 ms for 393,216 rows of 1,024 in BF16), so GPUs have a kernel for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.kernels.cpu import routing as compiled
from moe_train.precision import support


class Plan(NamedTuple):
    """Which token-expert pair stands where. Pair p = token · k + choice; n = t · k pairs."""

    pair_n: Tensor  # int64: the pair at each sorted place
    token_n: Tensor  # int64: its token
    place_tk: Tensor  # int64: the sorted place of each pair
    ends_e: Tensor  # int32: where each expert's run of places ends
    counts_e: Tensor  # int64: how many tokens each expert got, padding left out


def plan(expert_tk: Tensor, real_t: Tensor, num_experts: int) -> Plan:
    """Sort the pairs by expert; ties keep the order of tokens, so the result is the same on every run. No host sync.

    real_t: False for padding, which goes through its experts like the rest but is not counted as their load.
    """
    if compiled.takes(expert_tk):
        pair_n, token_n, place_tk, ends_e, counts_e = compiled.sort_by_expert(expert_tk, real_t, num_experts)
        return Plan(pair_n, token_n, place_tk, ends_e, counts_e)
    if support.runs_triton(expert_tk.device):
        from moe_train.kernels import routing

        if routing.takes_pairs(expert_tk, num_experts):
            return Plan(*routing.sort_by_expert(expert_tk, real_t, num_experts))
    sorted_n, pair_n = expert_tk.flatten().sort(stable=True)
    place_n = torch.empty_like(pair_n)
    place_n[pair_n] = torch.arange(len(pair_n), device=pair_n.device)
    experts = torch.arange(num_experts, device=pair_n.device, dtype=sorted_n.dtype)
    ends_e = torch.searchsorted(sorted_n, experts, right=True)
    token_n = pair_n // expert_tk.shape[1]
    counted_upto = F.pad(real_t[token_n].cumsum(0), (1, 0))
    counts_e = torch.diff(counted_upto[ends_e], prepend=counted_upto[:1])
    return Plan(pair_n, token_n, place_n.view_as(expert_tk), ends_e.to(torch.int32), counts_e)


_COLLECTED = (torch.float32, torch.bfloat16, torch.float16)  # what kernels/collect.py sums


def summed(rows_nd: Tensor, places_tk: Tensor) -> Tensor:
    """For each t the sum of the rows at its places: (t, d)."""
    if rows_nd.dtype not in _COLLECTED or not support.runs_triton(rows_nd.device):
        return F.embedding_bag(places_tk, rows_nd, mode="sum")
    if places_tk.shape[1] == 1:
        return _rows_at(rows_nd, places_tk.view(-1))
    from moe_train.kernels.collect import collect  # Triton is not everywhere

    out: Tensor = collect(rows_nd, places_tk)
    return out


def _rows_at(x_td: Tensor, source_n: Tensor) -> Tensor:
    """Of one number each: 32,768 by `index_select` take 5 to 8 µs on an H200, by `take` 3 to 4."""
    if x_td.shape[1] == 1 and x_td.is_cuda:
        return x_td.flatten().take(source_n).unsqueeze(1)
    return x_td.index_select(0, source_n)


class _Spread(torch.autograd.Function):
    """Row i of the result is row `source_n[i]` of x; backwards the rows at `places_tk[t]` are summed."""

    @staticmethod
    def forward(ctx: Any, x_td: Tensor, source_n: Tensor, places_tk: Tensor) -> Tensor:
        ctx.save_for_backward(places_tk)
        return _rows_at(x_td, source_n)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (places_tk,) = ctx.saved_tensors
        return summed(grad_outputs[0], places_tk), None, None


class _Collect(torch.autograd.Function):
    """Row t of the result is the sum of the rows of y at `places_tk[t]`; backwards row `source_n[i]` goes to row i."""

    @staticmethod
    def forward(ctx: Any, y_nd: Tensor, source_n: Tensor, places_tk: Tensor) -> Tensor:
        ctx.save_for_backward(source_n)
        return summed(y_nd, places_tk)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (source_n,) = ctx.saved_tensors
        return _rows_at(grad_outputs[0], source_n), None, None


def to_experts(x_td: Tensor, plan: Plan) -> Tensor:
    """Each token's row once per chosen expert, sorted by expert: (n, d)."""
    out: Tensor = _Spread.apply(x_td, plan.token_n, plan.place_tk)  # type: ignore[no-untyped-call]
    return out


def gates_to_experts(gate_tk: Tensor, plan: Plan) -> Tensor:
    """The gate value of each sorted place: (n, 1)."""
    out: Tensor = _Spread.apply(gate_tk.reshape(-1, 1), plan.pair_n, plan.place_tk.view(-1, 1))  # type: ignore[no-untyped-call]
    return out


def from_experts(y_nd: Tensor, plan: Plan) -> Tensor:
    """Sum the rows of each token's experts back into its place: (t, d)."""
    out: Tensor = _Collect.apply(y_nd, plan.token_n, plan.place_tk)  # type: ignore[no-untyped-call]
    return out


def permuted(x_nd: Tensor, order_n: Tensor, inverse_n: Tensor) -> Tensor:
    """Row i of the result is row order_n[i] of x; inverse_n is the way back, which gradients take."""
    out: Tensor = _Spread.apply(x_nd, order_n, inverse_n.view(-1, 1))  # type: ignore[no-untyped-call]
    return out
