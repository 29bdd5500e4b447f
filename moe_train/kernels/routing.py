"""The experts of each token and the tokens of each expert on a GPU: what kernels/cpu/routing.c does, a visit each.

Choosing takes k maxima of a row. They are of integers in the order of the scores, so that what is taken can be marked
by one below all, NaN can stand above all as for torch, and a warp has an instruction for them.
Sorting counts: how often each expert occurs in each block of 128 pairs, one running sum over experts and the blocks of
each, and then a pair's place is where its expert's pairs of its block begin plus how many of these precede it. Sums are
of integers or in a fixed order. Nothing waits for the host. On an H200 choosing 6 of
96 experts for 65,536 tokens takes 0.04 ms and sorting the pairs 0.07, torch's topk and sort 0.5.

    t tokens = b sequences of a length, e experts, k of them a token, n = t · k pairs
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_train.kernels.capability import check

MOST_EXPERTS = 1024  # whose scores are a row that a program holds
_PART = 64  # tokens of a sequence that a program chooses for
_PAIRS = 128  # that a program sorts
_COLUMNS = tl.constexpr(32)  # experts that are counted at a time
_TAKEN = tl.constexpr(-(2**31))
_NAN = tl.constexpr(2**31 - 1)


@triton.jit
def _scores(logits, token, inside, column, e):
    """Sigmoids of a block's logits in FP32, zero beyond its edges."""
    at = logits + token[:, None] * e + column[None, :]
    x = tl.load(at, mask=inside[:, None] & (column < e)[None, :], other=float("-inf"))
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _choose_kernel(
    logits, bias_ptr, real_ptr, expert_ptr, gate_ptr, share_ptr, count_ptr, scaling, length, parts, e, k,
    PART: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    sequence, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    column, slot = tl.arange(0, E), tl.arange(0, K)
    bias = tl.load(bias_ptr + column, mask=column < e, other=0.0)
    shares, counts = tl.zeros((ROWS, E), tl.float32), tl.zeros((ROWS, E), tl.int32)
    for first in range(0, PART, ROWS):
        position = part * PART + first + tl.arange(0, ROWS)
        inside = position < length
        token = sequence.to(tl.int64) * length + position
        score = _scores(logits, token, inside, column, e)
        biased = score + bias[None, :]
        bits = biased.to(tl.int32, bitcast=True)
        order = tl.where(biased == biased, bits ^ ((bits >> 31) & 0x7FFFFFFF), _NAN)
        order = tl.where((column < e)[None, :], order, _TAKEN)
        gate = tl.zeros((ROWS, K), tl.float32)
        for j in range(k):
            largest = tl.max(order, 1)
            place = tl.min(tl.where(order == largest[:, None], column[None, :], E), 1)
            here = column[None, :] == place[:, None]
            chosen = tl.sum(tl.where(here, score.to(tl.int32, bitcast=True), 0), 1).to(tl.float32, bitcast=True)
            tl.store(expert_ptr + token * k + j, place.to(tl.int64), mask=inside)
            gate = tl.where(slot[None, :] == j, chosen[:, None], gate)
            order = tl.where(here, _TAKEN, order)
        if NORM:
            gate = gate / (tl.sum(gate, 1) + 1e-20)[:, None]
        at = gate_ptr + token[:, None] * k + slot[None, :]
        tl.store(at, gate * scaling, mask=inside[:, None] & (slot < k)[None, :])
        if share_ptr is not None:
            real = tl.load(real_ptr + token, mask=inside, other=0) != 0
            scale = 1.0 / tl.sum(score, 1)
            shares += tl.where(real[:, None], score * scale[:, None], 0.0)
            counts += (real[:, None] & (order == _TAKEN)).to(tl.int32)
    if share_ptr is not None:
        at = tl.program_id(0).to(tl.int64) * e + column
        tl.store(share_ptr + at, tl.sum(shares, 0), mask=column < e)
        tl.store(count_ptr + at, tl.sum(counts, 0), mask=column < e)


@triton.jit
def _sequence_loss_kernel(share_ptr, count_ptr, slope_ptr, loss_ptr, weight, parts, e, k, E: tl.constexpr):
    """Of a sequence: Σ f P over the experts, times its tokens and the weight, and its slope by the sums of shares."""
    sequence, column = tl.program_id(0).to(tl.int64), tl.arange(0, E)
    share, count = tl.zeros((E,), tl.float32), tl.zeros((E,), tl.int32)
    for part in range(parts):
        at = (sequence * parts + part) * e + column
        share += tl.load(share_ptr + at, mask=column < e, other=0.0)
        count += tl.load(count_ptr + at, mask=column < e, other=0)
    tokens = tl.maximum(tl.sum(count, 0) // k, 1)
    slope = weight * (count.to(tl.float32) * e / k / tokens)
    tl.store(slope_ptr + sequence * e + column, slope, mask=column < e)
    tl.store(loss_ptr + sequence, tl.sum(slope * share, 0))


@triton.jit
def _choice_gradient_kernel(
    logits, real_ptr, expert_ptr, grad_gate, slope_ptr, grad_loss, out, scaling, t, length, e, k,
    ROWS: tl.constexpr, E: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """s (1 - s) times the gradient of s. Of the sequence's loss, with the sum S of a token's scores and the slope g:
    g / S - (Σ g s) / S². Of gates c s / S over the chosen: c (g - (Σ g s) / S) / S.
    """
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, E)
    inside = token < t
    score = _scores(logits, token, inside, column, e)
    grad = tl.zeros((ROWS, E), tl.float32)
    if grad_loss is not None:
        real = tl.load(real_ptr + token, mask=inside, other=0) != 0
        at = slope_ptr + (token // length)[:, None] * e + column[None, :]
        g = tl.load(at, mask=real[:, None] & (column < e)[None, :], other=0.0) * tl.load(grad_loss)
        scale = 1.0 / tl.sum(score, 1)
        mean = tl.sum(g * score, 1) * scale
        grad = tl.where(real[:, None], (g - mean[:, None]) * scale[:, None], 0.0)
    if grad_gate is not None:
        given, chosen = tl.zeros((ROWS, E), tl.float32), tl.zeros((ROWS, E), tl.float32)
        for j in range(k):
            place = tl.load(expert_ptr + token * k + j, mask=inside, other=-1).to(tl.int32)
            here = column[None, :] == place[:, None]
            of_gate = tl.load(grad_gate + token * k + j, mask=inside, other=0.0)
            given = tl.where(here, of_gate[:, None], given)
            chosen = tl.where(here, 1.0, chosen)
        if NORM:
            total = tl.sum(tl.where(chosen > 0, score, 0.0), 1) + 1e-20
            mean = tl.sum(tl.where(chosen > 0, given * score, 0.0), 1) / total
            given = (given - mean[:, None] * chosen) / total[:, None]
        grad += scaling * given
    at = out + token[:, None] * e + column[None, :]
    tl.store(at, grad * (score * (1.0 - score)), mask=inside[:, None] & (column < e)[None, :])


@triton.jit
def _count_kernel(expert_ptr, real_ptr, counts, real_counts, n, k, e, blocks, PAIRS: tl.constexpr):
    """How many pairs of a block, and of these of real tokens, go to each expert: (e, blocks)."""
    block = tl.program_id(0)
    pair = block * PAIRS + tl.arange(0, PAIRS)
    expert = tl.load(expert_ptr + pair, mask=pair < n, other=-1).to(tl.int32)
    real = tl.load(real_ptr + pair // k, mask=pair < n, other=0) != 0
    for first in range(0, e, _COLUMNS):
        column = first + tl.arange(0, _COLUMNS)
        same = expert[:, None] == column[None, :]
        at = column.to(tl.int64) * blocks + block
        tl.store(counts + at, tl.sum(same.to(tl.int32), 0), mask=column < e)
        tl.store(real_counts + at, tl.sum((same & real[:, None]).to(tl.int32), 0), mask=column < e)


@triton.jit
def _place_kernel(
    expert_ptr, counts, upto, real_counts, pair_ptr, token_ptr, place_ptr, ends_ptr, counted_ptr, n, k, e, blocks,
    PAIRS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    index = tl.arange(0, PAIRS)
    pair = block * PAIRS + index
    inside = pair < n
    expert = tl.load(expert_ptr + pair, mask=inside, other=-1).to(tl.int32)
    same = expert[:, None] == expert[None, :]
    before = tl.sum((same & (index[None, :] < index[:, None])).to(tl.int32), 1)
    at = expert.to(tl.int64) * blocks + block
    start = tl.load(upto + at, mask=inside, other=0) - tl.load(counts + at, mask=inside, other=0)
    place = start + before
    tl.store(place_ptr + pair, place.to(tl.int64), mask=inside)
    tl.store(pair_ptr + place, pair.to(tl.int64), mask=inside)
    tl.store(token_ptr + place, (pair // k).to(tl.int64), mask=inside)
    for each in range(block, e, blocks):  # the experts are shared out, one to most programs
        row = each * blocks
        counted = tl.zeros((PAIRS,), tl.int32)
        for first in range(0, blocks, PAIRS):
            counted += tl.load(real_counts + row + first + index, mask=first + index < blocks, other=0)
        tl.store(counted_ptr + each, tl.sum(counted, 0).to(tl.int64))
        tl.store(ends_ptr + each, tl.load(upto + row + blocks - 1))


def _rows(e: int) -> tuple[int, int]:
    """Tokens, and the power of two of experts, that a program works on at a time: at most 2,048 scores."""
    lanes = max(16, triton.next_power_of_2(e))
    return min(16, 2048 // lanes), lanes


class Gating(NamedTuple):
    """What becomes of the scores chosen, and how much of the sequences' balance is in the objective."""

    k: int
    normalised: bool  # gates of a token sum to one, before they are
    scaled: float
    loss_weight: float  # 0: there is no such loss


class Chosen(NamedTuple):
    expert_tk: Tensor  # int64, the best first and the lower of equal ones
    gate_tk: Tensor
    loss: Tensor | None  # model/balancing.py's `sequence_balance_loss`
    slope_be: Tensor | None  # of it, by the sums of shares


def choose_experts(logits_te: Tensor, bias_e: Tensor, real_bt: Tensor, gating: Gating) -> Chosen:
    """Scores are sigmoids of the logits (FP32), experts chosen by score plus bias. real_bt: bool. Raises ValueError."""
    (t, e), k = logits_te.shape, gating.k
    check(logits_te.dtype == bias_e.dtype == torch.float32 and bias_e.shape == (e,), "logits and bias: FP32, e columns")
    check(1 <= k <= e <= MOST_EXPERTS, f"{k} of {e} experts: 1 to all of at most {MOST_EXPERTS}")
    check(real_bt.dtype == torch.bool and real_bt.numel() == t, f"real: bool, one for each of {t} tokens")
    balances = gating.loss_weight > 0
    b, length = real_bt.shape if balances else (1, t)
    parts, (rows, lanes) = max(1, triton.cdiv(length, _PART)), _rows(e)
    expert_tk = torch.empty(t, k, dtype=torch.int64, device=logits_te.device)
    gate_tk = torch.empty(t, k, dtype=torch.float32, device=logits_te.device)
    share = logits_te.new_empty(b, parts, e) if balances else None
    count = None if share is None else torch.empty_like(share, dtype=torch.int32)
    tensors = (logits_te.contiguous(), bias_e.contiguous(), _bytes(real_bt), expert_tk, gate_tk, share, count)
    sizes = {"PART": _PART, "ROWS": rows, "E": lanes, "K": triton.next_power_of_2(k), "NORM": gating.normalised}
    if b:
        _choose_kernel[(b * parts,)](*tensors, gating.scaled, length, parts, e, k, **sizes)
    if share is None:
        return Chosen(expert_tk, gate_tk, None, None)
    slope_be, loss_b = logits_te.new_empty(b, e), logits_te.new_empty(b)
    if b:
        _sequence_loss_kernel[(b,)](share, count, slope_be, loss_b, gating.loss_weight, parts, e, k, E=lanes)
    return Chosen(expert_tk, gate_tk, loss_b.sum(), slope_be)


def choice_gradient(
    logits_te: Tensor,
    real_bt: Tensor,
    expert_tk: Tensor,
    slope_be: Tensor | None,
    gating: Gating,
    grad_tk: Tensor | None,
    grad_loss: Tensor | None,
) -> Tensor:
    """Of the logits, from those of the gates (t, k) and of the loss (); experts and slope as chosen."""
    (t, e), k, length = logits_te.shape, gating.k, real_bt.shape[1]
    rows, lanes = _rows(e)
    out = torch.empty_like(logits_te, memory_format=torch.contiguous_format)
    of_gates = None if grad_tk is None else grad_tk.contiguous()
    of_loss = (None, None) if grad_loss is None else (slope_be, grad_loss)
    tensors = (logits_te.contiguous(), _bytes(real_bt), expert_tk.contiguous(), of_gates, *of_loss, out)
    sizes = {"ROWS": rows, "E": lanes, "NORM": gating.normalised}
    if t:
        _choice_gradient_kernel[(triton.cdiv(t, rows),)](*tensors, gating.scaled, t, length, e, k, **sizes)
    return out


def _bytes(real: Tensor) -> Tensor:
    return real.contiguous().view(torch.uint8)


class Choosing(torch.autograd.Function):
    """`choose_experts` with its gradient → experts, gates and the loss; the logits are kept, and what was chosen."""

    @staticmethod
    def forward(
        ctx: Any, logits_te: Tensor, bias_e: Tensor, real_bt: Tensor, gating: Gating
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        chosen = choose_experts(logits_te, bias_e, real_bt, gating)
        ctx.save_for_backward(logits_te, real_bt, chosen.expert_tk, chosen.slope_be)
        ctx.gating = gating
        ctx.mark_non_differentiable(chosen.expert_tk)
        ctx.set_materialize_grads(False)
        return chosen[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None]:
        logits_te, real_bt, expert_tk, slope_be = ctx.saved_tensors
        grad_te = choice_gradient(logits_te, real_bt, expert_tk, slope_be, ctx.gating, grads[1], grads[2])
        return grad_te, None, None, None


def takes_pairs(expert_tk: Tensor, num_experts: int) -> bool:
    """Whether `sort_by_expert` can count them: places are 32 bits, and so are those of the table of counts."""
    return expert_tk.dtype == torch.int64 and (expert_tk.numel() // _PAIRS + 1) * max(_PAIRS, num_experts) < 2**31


def sort_by_expert(
    expert_tk: Tensor, real_t: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What model/dispatch.py's Plan is made of, from experts in 0 … num_experts - 1. Raises ValueError."""
    (t, k), n = expert_tk.shape, expert_tk.numel()
    check(takes_pairs(expert_tk, num_experts), "experts: int64, of fewer than 2³¹ pairs")
    check(real_t.dtype == torch.bool and real_t.shape == (t,), f"real: bool, one for each of {t} tokens")
    blocks = max(1, triton.cdiv(n, _PAIRS))
    expert = expert_tk.contiguous()
    counts = torch.empty(2, num_experts, blocks, dtype=torch.int32, device=expert.device)
    _count_kernel[(blocks,)](expert, _bytes(real_t), counts[0], counts[1], n, k, num_experts, blocks, PAIRS=_PAIRS)
    upto = counts[0].flatten().cumsum(0, dtype=torch.int32)  # experts in order, and of each its blocks in order
    pair_n, token_n, place_tk = expert.new_empty(n), expert.new_empty(n), torch.empty_like(expert)
    ends_e, counts_e = torch.empty_like(upto[:num_experts]), expert.new_empty(num_experts)
    made = (pair_n, token_n, place_tk, ends_e, counts_e)
    _place_kernel[(blocks,)](expert, counts[0], upto, counts[1], *made, n, k, num_experts, blocks, PAIRS=_PAIRS)
    return made
