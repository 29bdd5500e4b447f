"""Dispatch with a fixed number of places an expert: what does not fit is dropped, what is not filled is multiplied too.

The layout of GShard and Switch (arXiv 2006.16668, 2101.03961) and of expert choice (2202.09368). An empty place holds
some token with gate 0; since the gate multiplies the activation before the down-projection, its output is exactly zero.
A token's rows are summed in the order of its places, in both directions: added up by atomics, as autograd would, they
would come out differently on each run of a GPU. Places are shared out among the tokens of one device's micro-batch, as
in Switch and GShard: cut otherwise, a batch drops other tokens. Padding takes no place, though places are reckoned from
all positions, since no shape may depend on the data. Arms to be measured against the dropless `dispatch`, so written
plainly.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.config import MoEConfig
from moe_train.model.router import Choice, choose_tokens


class Slots(NamedTuple):
    """n = e · c places, those of expert 0 first."""

    token_n: Tensor  # int64: the token at each place
    place_n: Tensor  # int64: places by their tokens, those of token 0 first
    starts_t: Tensor  # int64: where each token's places begin in place_n
    gate_n1: Tensor  # FP32; 0 where the place is empty
    ends_e: Tensor  # int32: where each expert's places end
    counts_e: Tensor  # int64: tokens that chose each expert, or that it chose
    dropped: Tensor  # FP32: pairs without a place over top_k; with expert choice, tokens that no expert took


def capacity(config: MoEConfig, num_tokens: int) -> int:
    """Places an expert has: its even share of num_tokens · top_k pairs times capacity_factor, rounded up."""
    assert config.capacity_factor is not None
    places = math.ceil(config.capacity_factor * num_tokens * config.top_k / config.num_experts)
    return min(max(places, 1), num_tokens)


def by_tokens(choice: Choice, real_t: Tensor, config: MoEConfig) -> Slots:
    """Every token to the experts it chose, as long as these have places. real_t: False for padding.

    Earlier tokens come first, with all their choices: whether a token is dropped then depends on none after it.
    (GShard serves all first choices before any second one, which lets the future in.)
    """
    num_tokens, top_k = choice.expert_tk.shape
    places, num_experts = capacity(config, num_tokens), config.num_experts
    expert_p = choice.expert_tk.flatten()
    chosen_pe = torch.zeros(len(expert_p), num_experts, dtype=torch.int64, device=expert_p.device)
    real_p = real_t.repeat_interleave(top_k)
    chosen_pe.scatter_(1, expert_p.unsqueeze(1), real_p.long().unsqueeze(1))
    rank_p = chosen_pe.cumsum(0).gather(1, expert_p.unsqueeze(1)).squeeze(1) - 1  # how many came before
    counts_e = chosen_pe.sum(0)
    fits_p = real_p & (rank_p < places)
    # What does not fit is written to one place past the end, which is cut off: no shape depends on the data.
    slot_p = torch.where(fits_p, expert_p * places + rank_p, num_experts * places)
    token_p = torch.arange(num_tokens, device=expert_p.device).repeat_interleave(top_k)
    some_token_n = torch.arange(num_experts * places + 1, device=expert_p.device) % num_tokens  # not all the same
    token_n = some_token_n.scatter(0, slot_p, token_p)[:-1]
    gate_p = choice.gate_tk.flatten()
    gate_n = gate_p.new_zeros(num_experts * places + 1).scatter(0, slot_p, gate_p)[:-1]
    dropped = (real_p & ~fits_p).float().sum() / top_k
    ends_e = _ends(num_experts, places, token_n)
    return Slots(token_n, *_by_token(token_n, num_tokens), gate_n.unsqueeze(1), ends_e, counts_e, dropped)


def by_experts(scores_te: Tensor, real_t: Tensor, config: MoEConfig) -> Slots:
    """Every expert takes its best tokens of the batch; a token's output is the sum over those that took it.

    real_t: False for padding, which is taken only where there is nothing else, and then with gate 0.
    """
    num_tokens, num_experts = scores_te.shape
    places = capacity(config, num_tokens)
    token_ec, score_ec = choose_tokens(scores_te * real_t.unsqueeze(1), places)  # scores are above 0
    taken_t = torch.zeros(num_tokens, dtype=torch.bool, device=scores_te.device)
    taken_t.index_fill_(0, token_ec.flatten(), True)  # to index it would copy the value from the host
    counts_e = real_t[token_ec].sum(1)
    gate_n1 = score_ec.reshape(-1, 1) * config.routed_scaling_factor
    ends_e, token_n = _ends(num_experts, places, token_ec), token_ec.flatten()
    dropped = (real_t & ~taken_t).float().sum()
    return Slots(token_n, *_by_token(token_n, num_tokens), gate_n1, ends_e, counts_e, dropped)


def to_experts(x_td: Tensor, slots: Slots) -> Tensor:
    """The row of the token at each place: (n, d)."""
    out: Tensor = _Spread.apply(x_td, slots.token_n, slots.place_n, slots.starts_t)  # type: ignore[no-untyped-call]
    return out


def from_experts(y_nd: Tensor, slots: Slots) -> Tensor:
    """Sum the rows of each token's places, in FP32 where y is narrower: (t, d)."""
    out: Tensor = _Collect.apply(y_nd, slots.token_n, slots.place_n, slots.starts_t)  # type: ignore[no-untyped-call]
    return out


class _Spread(torch.autograd.Function):
    """Row i of the result is row `token_n[i]` of x; backwards the rows of a token's places are summed."""

    @staticmethod
    def forward(ctx: Any, x_td: Tensor, token_n: Tensor, place_n: Tensor, starts_t: Tensor) -> Tensor:
        ctx.save_for_backward(place_n, starts_t)
        return x_td.index_select(0, token_n)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        place_n, starts_t = ctx.saved_tensors
        return F.embedding_bag(place_n, grad_outputs[0], starts_t, mode="sum"), None, None, None


class _Collect(torch.autograd.Function):
    """The other way round."""

    @staticmethod
    def forward(ctx: Any, y_nd: Tensor, token_n: Tensor, place_n: Tensor, starts_t: Tensor) -> Tensor:
        ctx.save_for_backward(token_n)
        return F.embedding_bag(place_n, y_nd, starts_t, mode="sum")

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (token_n,) = ctx.saved_tensors
        return grad_outputs[0].index_select(0, token_n), None, None, None


def _by_token(token_n: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """`place_n` and `starts_t`."""
    sorted_n, place_n = token_n.sort(stable=True)
    tokens = torch.arange(num_tokens, device=token_n.device)
    return place_n, torch.searchsorted(sorted_n, tokens)


def _ends(num_experts: int, places: int, like: Tensor) -> Tensor:
    return torch.arange(1, num_experts + 1, dtype=torch.int32, device=like.device) * places
