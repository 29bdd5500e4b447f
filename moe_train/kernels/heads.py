"""From projections to what attention reads, and back: heads split, joined and turned by position in one visit.

    q, k (b, h, t, c)   of each head what stays as it is, beside what turns by position (model/rope.py)
    v    (b, h, t, w)   values where they lie among the keys' projection: a view

They lie in memory as (b, t, h, c), which torch's attention takes as it is and answers with: its result is a token's
heads side by side without a copy. Features are turned in FP32 and rounded once. A rotary key that all heads share gets
the sum of their gradients, in FP32 and always in the same order: one program has all heads of its tokens. What is kept
for the backward pass is cos and sin. 65,536 tokens of 16 heads take 0.10 ms on an H200, backward 0.23; torch's
operations took about 4 for both.

    b batch, t positions, n = b · t, h heads, c features of queries and keys, w of values, m that turn
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_train.kernels.capability import check
from moe_train.kernels.device import narrow, widen

NUMBERS = 4096  # that a program has of queries or keys at a time, 32 a thread
HEADS = 16  # of these at a time, at most


@triton.jit
def _angles(cos, sin, token, n, t, TURNED: tl.constexpr, HALF: tl.constexpr):
    """cos of both halves, sin of both halves: (tokens, 1, HALF) each."""
    c = tl.arange(0, HALF)[None, None, :]
    at = (token % t)[:, None, None] * TURNED + c
    inside = (token < n)[:, None, None] & (c < TURNED // 2)
    cos_first, cos_second = tl.load(cos + at, mask=inside), tl.load(cos + at + TURNED // 2, mask=inside)
    sin_first, sin_second = tl.load(sin + at, mask=inside), tl.load(sin + at + TURNED // 2, mask=inside)
    return cos_first, cos_second, sin_first, sin_second


@triton.jit
def _block(token, n, head, HEADS: tl.constexpr, FEATURES: tl.constexpr, LANES: tl.constexpr):
    """Features of these heads of these tokens, and which there are."""
    c = tl.arange(0, LANES)[None, None, :]
    return c, (token < n)[:, None, None] & (head < HEADS)[None, :, None] & (c < FEATURES)


@triton.jit
def _split(
    plain, plain_batch, plain_token, plain_head, rotary, rotary_batch, rotary_token, rotary_head, out, cos, sin, n, t,
    HEADS: tl.constexpr, PLAIN: tl.constexpr, TURNED: tl.constexpr, SHARED: tl.constexpr,
    T: tl.constexpr, H: tl.constexpr, PLAIN_LANES: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Queries or keys of T tokens: plain and rotary point at the first of PLAIN and of TURNED features of a head."""
    token = tl.program_id(0) * T + tl.arange(0, T)
    batch, position = (token // t).to(tl.int64), (token % t).to(tl.int64)
    plain_row = plain + (batch * plain_batch + position * plain_token)[:, None, None]
    rotary_row = rotary + (batch * rotary_batch + position * rotary_token)[:, None, None]
    out_row = out + (token.to(tl.int64) * (HEADS * (PLAIN + TURNED)))[:, None, None]
    cos_first, cos_second, sin_first, sin_second = _angles(cos, sin, token, n, t, TURNED, HALF)
    for start in range(0, HEADS, H):
        head = start + tl.arange(0, H)
        out_head = out_row + (head * (PLAIN + TURNED))[None, :, None]
        if PLAIN > 0:
            plain_at = (head.to(tl.int64) * plain_head)[None, :, None]
            c, inside = _block(token, n, head, HEADS, PLAIN, PLAIN_LANES)
            tl.store(out_head + c, tl.load(plain_row + plain_at + c, mask=inside), mask=inside)
        c, inside = _block(token, n, head, HEADS, TURNED // 2, HALF)
        if SHARED:
            at = rotary_row + c
            read = (token < n)[:, None, None] & (c < TURNED // 2)
        else:
            at = rotary_row + (head.to(tl.int64) * rotary_head)[None, :, None] + c
            read = inside
        first, second = widen(tl.load(at, mask=read)), widen(tl.load(at + TURNED // 2, mask=read))
        turned_first = narrow(first * cos_first - second * sin_first, out.dtype.element_ty)
        turned_second = narrow(second * cos_second + first * sin_second, out.dtype.element_ty)
        tl.store(out_head + PLAIN + c, tl.broadcast_to(turned_first, (T, H, HALF)), mask=inside)
        tl.store(out_head + PLAIN + TURNED // 2 + c, tl.broadcast_to(turned_second, (T, H, HALF)), mask=inside)


@triton.jit
def _split_kernel(
    q, q_batch, q_token, q_head, k, k_batch, k_token, k_head, rotary, rotary_batch, rotary_token,
    q_out, k_out, cos, sin, n, t,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, PLAIN: tl.constexpr, TURNED: tl.constexpr,
    Q_T: tl.constexpr, Q_H: tl.constexpr, K_T: tl.constexpr, K_H: tl.constexpr,
    PLAIN_LANES: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Keys, and then queries if there are any; rotary keys that all heads share, or None."""
    if tl.program_id(1) == 0:
        if rotary is None:
            _split(
                k, k_batch, k_token, k_head, k + PLAIN, k_batch, k_token, k_head, k_out, cos, sin, n, t,
                K_HEADS, PLAIN, TURNED, False, K_T, K_H, PLAIN_LANES, HALF,
            )  # fmt: skip
        else:
            _split(
                k, k_batch, k_token, k_head, rotary, rotary_batch, rotary_token, 0, k_out, cos, sin, n, t,
                K_HEADS, PLAIN, TURNED, True, K_T, K_H, PLAIN_LANES, HALF,
            )  # fmt: skip
    else:
        if q is not None:
            _split(
                q, q_batch, q_token, q_head, q + PLAIN, q_batch, q_token, q_head, q_out, cos, sin, n, t,
                Q_HEADS, PLAIN, TURNED, False, Q_T, Q_H, PLAIN_LANES, HALF,
            )  # fmt: skip


@triton.jit
def _join(
    d, d_batch, d_head, d_token, plain, rotary, cos, sin, n, t,
    HEADS: tl.constexpr, PLAIN: tl.constexpr, BESIDE: tl.constexpr, TURNED: tl.constexpr, SHARED: tl.constexpr,
    T: tl.constexpr, H: tl.constexpr, PLAIN_LANES: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The gradient of T tokens of what `_split` read: of each head of `plain` PLAIN features and room for BESIDE."""
    token = tl.program_id(0) * T + tl.arange(0, T)
    row = token.to(tl.int64)
    d_row = d + ((row // t) * d_batch + (row % t) * d_token)[:, None, None]
    cos_first, cos_second, sin_first, sin_second = _angles(cos, sin, token, n, t, TURNED, HALF)
    sum_first, sum_second = tl.zeros((T, HALF), tl.float32), tl.zeros((T, HALF), tl.float32)
    for start in range(0, HEADS, H):
        head = start + tl.arange(0, H)
        d_at = d_row + (head.to(tl.int64) * d_head)[None, :, None]
        at = (row * (HEADS * (PLAIN + BESIDE)))[:, None, None] + (head * (PLAIN + BESIDE))[None, :, None]
        if PLAIN > 0:
            c, inside = _block(token, n, head, HEADS, PLAIN, PLAIN_LANES)
            tl.store(plain + at + c, tl.load(d_at + c, mask=inside), mask=inside)
        c, inside = _block(token, n, head, HEADS, TURNED // 2, HALF)
        first = widen(tl.load(d_at + PLAIN + c, mask=inside, other=0.0))
        second = widen(tl.load(d_at + PLAIN + TURNED // 2 + c, mask=inside, other=0.0))
        if SHARED:
            sum_first += tl.sum(first, 1)
            sum_second += tl.sum(second, 1)
        else:
            back_first = first * cos_first + second * sin_first
            back_second = second * cos_second - first * sin_second
            tl.store(rotary + at + c, narrow(back_first, rotary.dtype.element_ty), mask=inside)
            tl.store(rotary + at + TURNED // 2 + c, narrow(back_second, rotary.dtype.element_ty), mask=inside)
    if SHARED:
        first, second = sum_first[:, None, :], sum_second[:, None, :]
        c = tl.arange(0, HALF)[None, None, :]
        at, inside = (row * TURNED)[:, None, None] + c, (token < n)[:, None, None] & (c < TURNED // 2)
        back_first = first * cos_first + second * sin_first
        back_second = second * cos_second - first * sin_second
        tl.store(rotary + at, narrow(back_first, rotary.dtype.element_ty), mask=inside)
        tl.store(rotary + at + TURNED // 2, narrow(back_second, rotary.dtype.element_ty), mask=inside)


@triton.jit
def _join_kernel(
    dq, dq_batch, dq_head, dq_token, dk, dk_batch, dk_head, dk_token, dv, dv_batch, dv_head, dv_token,
    q_out, k_out, rotary_out, cos, sin, n, t,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, PLAIN: tl.constexpr, TURNED: tl.constexpr, VALUES: tl.constexpr,
    Q_T: tl.constexpr, Q_H: tl.constexpr, K_T: tl.constexpr, K_H: tl.constexpr,
    PLAIN_LANES: tl.constexpr, HALF: tl.constexpr, VALUE_LANES: tl.constexpr,
):  # fmt: skip
    """Gradients of keys, with those of values beside and of a rotary key that all heads share, or without; queries."""
    if tl.program_id(1) == 0:
        if dv is None:
            _join(
                dk, dk_batch, dk_head, dk_token, k_out, k_out + PLAIN, cos, sin, n, t,
                K_HEADS, PLAIN, TURNED, TURNED, False, K_T, K_H, PLAIN_LANES, HALF,
            )  # fmt: skip
        else:
            _join(
                dk, dk_batch, dk_head, dk_token, k_out, rotary_out, cos, sin, n, t,
                K_HEADS, PLAIN, VALUES, TURNED, True, K_T, K_H, PLAIN_LANES, HALF,
            )  # fmt: skip
            token = tl.program_id(0) * K_T + tl.arange(0, K_T)
            row = token.to(tl.int64)
            dv_row = dv + ((row // t) * dv_batch + (row % t) * dv_token)[:, None, None]
            out_row = k_out + PLAIN + (row * (K_HEADS * (PLAIN + VALUES)))[:, None, None]
            for start in range(0, K_HEADS, K_H):
                head = start + tl.arange(0, K_H)
                c, inside = _block(token, n, head, K_HEADS, VALUES, VALUE_LANES)
                d = tl.load(dv_row + (head.to(tl.int64) * dv_head)[None, :, None] + c, mask=inside)
                tl.store(out_row + (head * (PLAIN + VALUES))[None, :, None] + c, d, mask=inside)
    else:
        _join(
            dq, dq_batch, dq_head, dq_token, q_out, q_out + PLAIN, cos, sin, n, t,
            Q_HEADS, PLAIN, TURNED, TURNED, False, Q_T, Q_H, PLAIN_LANES, HALF,
        )  # fmt: skip


def _readable(x: Tensor) -> Tensor:
    """With features one after another, which the kernels ask for; strides of all else are free."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _tile(heads: int, features: int) -> tuple[int, int]:
    """How many tokens and heads a program has at a time."""
    at_once = min(HEADS, triton.next_power_of_2(heads))
    return max(1, NUMBERS // (at_once * triton.next_power_of_2(features))), at_once


def _split_heads(
    q_bthc: Tensor | None, k_bthp: Tensor, rotary_btm: Tensor | None, cos_tm: Tensor, sin_tm: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """Queries, if any, and keys (b, t, h, c). With shared rotary keys k_bthp is what stays of the keys only."""
    turned = cos_tm.shape[1]
    plain = k_bthp.shape[3] - (turned if rotary_btm is None else 0)
    b, t, k_heads, _ = k_bthp.shape
    q_heads = 1 if q_bthc is None else q_bthc.shape[2]
    q_out = None if q_bthc is None else q_bthc.new_empty(b, t, q_heads, plain + turned, dtype=dtype)
    k_out = k_bthp.new_empty(b, t, k_heads, plain + turned, dtype=dtype)
    (q_t, q_h), (k_t, k_h) = _tile(q_heads, plain + turned), _tile(k_heads, plain + turned)
    if b * t:
        q, k = None if q_bthc is None else _readable(q_bthc), _readable(k_bthp)
        rotary = None if rotary_btm is None else _readable(rotary_btm)
        grid = (triton.cdiv(b * t, k_t), 1) if q is None else (triton.cdiv(b * t, min(q_t, k_t)), 2)
        _split_kernel[grid](
            q, *((0, 0, 0) if q is None else q.stride()[:3]),
            k, *k.stride()[:3],
            rotary, *((0, 0) if rotary is None else rotary.stride()[:2]),
            q_out, k_out, cos_tm.contiguous(), sin_tm.contiguous(), b * t, t,
            Q_HEADS=q_heads, K_HEADS=k_heads, PLAIN=plain, TURNED=turned,
            Q_T=q_t, Q_H=q_h, K_T=k_t, K_H=k_h,
            PLAIN_LANES=triton.next_power_of_2(max(plain, 1)), HALF=triton.next_power_of_2(turned // 2),
        )  # fmt: skip
    return q_out, k_out


def _join_heads(
    dq_bhtc: Tensor,
    dk_bhtc: Tensor,
    dv_bhtw: Tensor | None,
    cos_tm: Tensor,
    sin_tm: Tensor,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients by token: of queries (b, t, h, c), of keys, with values beside what stays of them, of rotary keys."""
    turned = cos_tm.shape[1]
    b, q_heads, t, c = dq_bhtc.shape
    k_heads, plain = dk_bhtc.shape[1], c - turned
    values = 0 if dv_bhtw is None else dv_bhtw.shape[3]
    q_out = dq_bhtc.new_empty(b, t, q_heads, c, dtype=q_dtype)
    k_out = dk_bhtc.new_empty(b, t, k_heads, c if dv_bhtw is None else plain + values, dtype=k_dtype)
    rotary_out = None if dv_bhtw is None else dk_bhtc.new_empty(b, t, turned)
    (q_t, q_h), (k_t, k_h) = _tile(q_heads, c), _tile(k_heads, max(c, values))
    if b * t:
        dq, dk, dv = _readable(dq_bhtc), _readable(dk_bhtc), None if dv_bhtw is None else _readable(dv_bhtw)
        grid = (triton.cdiv(b * t, min(q_t, k_t)), 2)
        _join_kernel[grid](
            dq, *dq.stride()[:3],
            dk, *dk.stride()[:3],
            dv, *((0, 0, 0) if dv is None else dv.stride()[:3]),
            q_out, k_out, rotary_out, cos_tm.contiguous(), sin_tm.contiguous(), b * t, t,
            Q_HEADS=q_heads, K_HEADS=k_heads, PLAIN=plain, TURNED=turned, VALUES=values,
            Q_T=q_t, Q_H=q_h, K_T=k_t, K_H=k_h,
            PLAIN_LANES=triton.next_power_of_2(max(plain, 1)), HALF=triton.next_power_of_2(turned // 2),
            VALUE_LANES=triton.next_power_of_2(max(values, 1)),
        )  # fmt: skip
    return q_out, k_out, rotary_out


def _check_angles(t: int, cos_tm: Tensor, sin_tm: Tensor) -> int:
    turned = cos_tm.shape[-1]
    check(cos_tm.shape == sin_tm.shape == (t, turned) and turned % 2 == 0, f"cos, sin: pairs of features of {t} tokens")
    check(cos_tm.dtype == sin_tm.dtype == torch.float32, "cos, sin: FP32")
    return turned


def shared_keys(kv_btx: Tensor, rotary_btm: Tensor, cos_tm: Tensor, sin_tm: Tensor, heads: int, values: int) -> Tensor:
    """The keys of `LatentHeads` alone, (b, h, t, c), not differentiable."""
    kv = kv_btx.unflatten(2, (heads, -1))
    _, k = _split_heads(None, kv[..., : kv.shape[3] - values], rotary_btm, cos_tm, sin_tm, kv.dtype)
    return k.transpose(1, 2)


class LatentHeads(torch.autograd.Function):
    """q (b, t, h · c), kv (b, t, h · (c - m + w)), rotary keys (b, t, m), cos, sin (t, m), h → q, k, v by heads.

    Of one format, BF16, FP16 or FP32; any strides. Of kv each head has what stays of its key, then its value, which is
    returned where it lies. Raises ValueError.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, rotary: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin, heads = others
        b, t, turned = *q.shape[:2], _check_angles(q.shape[1], cos, sin)
        c, per_head = q.shape[2] // heads, kv.shape[2] // heads
        check(q.shape[2] == heads * c and c > turned, f"q: {heads} heads of more than the {turned} features that turn")
        check(kv.shape == (b, t, heads * per_head), f"kv: of {heads} heads of {b} × {t} tokens")
        check(per_head > c - turned, f"kv: {per_head} features of a head, more than the {c - turned} of its key")
        check(rotary.shape == (b, t, turned), f"rotary keys: {turned} features of {b} × {t} tokens")
        check(q.dtype == kv.dtype == rotary.dtype, "q, kv and rotary keys: one format")
        kv_bthx = kv.unflatten(2, (heads, per_head))
        stays, v = kv_bthx.split((c - turned, per_head - c + turned), dim=3)
        made, k = _split_heads(q.unflatten(2, (heads, c)), stays, rotary, cos, sin, q.dtype)
        assert made is not None
        ctx.save_for_backward(cos, sin)
        return made.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = grad_outputs
        cos, sin = ctx.saved_tensors
        q, kv, rotary = _join_heads(dq, dk, dv, cos, sin, dq.dtype, dk.dtype)
        return q.flatten(2), kv.flatten(2), rotary, None, None, None


class GroupedHeads(torch.autograd.Function):
    """q (b, t, h, c), k (b, t, g, c), cos, sin (t, c), a format → turned and rounded to it, (b, h, t, c), (b, g, t, c).

    In BF16, FP16 or FP32 each; any strides. Raises ValueError.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        cos, sin, dtype = others
        turned = _check_angles(q.shape[1], cos, sin)
        check(q.shape[3] == k.shape[3] == turned and q.shape[:2] == k.shape[:2], "q, k: as many tokens and features")
        made, keys = _split_heads(q, k, None, cos, sin, dtype)
        assert made is not None
        ctx.save_for_backward(cos, sin)
        ctx.dtypes = q.dtype, k.dtype
        return made.transpose(1, 2), keys.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk = grad_outputs
        cos, sin = ctx.saved_tensors
        q, k, _ = _join_heads(dq, dk, None, cos, sin, *ctx.dtypes)
        return q, k, None, None, None
