"""Causal attention in BF16 on a CPU: all heads of a tile of scores in one batched product.

torch's fused kernel for CPUs goes head by head and reaches a tenth of what two AVX-512 cores multiply in BF16. Here a
tile is some rows of some heads, small enough for the cache: no two tiles of scores exist at the same time, those above
the diagonal only in the square that a tile has on it, and in the backward pass they are computed again (FlashAttention,
arXiv 2205.14135). Scores, their softmax and its gradient are FP32, which makes gradients 1 to 3 dB nearer to float64's
than the fused kernel's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_train.precision.cpu_threads import on_cores

_ROWS = 64  # of a tile, before heads that share keys are folded into them
_ENOUGH = 10**7  # multiplications of scores from which threads pay
_SCORES = 2**19  # of a tile: 2 MB in FP32; more where one head has more


class CausalAttention(torch.autograd.Function):
    """q (b, h, t, c), k (b, g, t, c), v (b, g, t, c_v), h a multiple of g → (b, h, t, c_v).

    Query head i attends to key-value head i // (h / g), as in SDPA's `enable_gqa`.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        q_nrtc, k_ntc, v_ntc = _by_keys(q, k, v)
        out_nrtc = v.new_empty(*q_nrtc.shape[:3], v.shape[-1])

        def attend(heads: slice) -> None:
            tile = _Tile(q_nrtc[heads], scale)
            for some in tile.heads(heads.start):
                wide_q, wide_k = q_nrtc[some].float(), k_ntc[some].float()
                for start, end in tile.rows():
                    p = tile.narrow(tile.probabilities(wide_q, wide_k, start, end))
                    _put(out_nrtc[some, :, start:end], torch.bmm(p, v_ntc[some, :end]))

        _all_heads(attend, q_nrtc)
        return out_nrtc.view(*q.shape[:3], v.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """With P the probabilities: dv = Pᵀ·do, dP = do·vᵀ, ds = P∘(dP - rowsum(P∘dP)), dq = ds·k, dk = dsᵀ·q."""
        q, k, v = ctx.saved_tensors
        q_nrtc, k_ntc, v_ntc = _by_keys(q, k, v)
        grad_nrtc = _folded(grad_outputs[0], k.shape[1])
        dq, dk, dv = torch.empty_like(q_nrtc), torch.empty_like(k_ntc), torch.empty_like(v_ntc)

        def gradients(heads: slice) -> None:
            tile = _Tile(q_nrtc[heads], ctx.scale)
            for some in tile.heads(heads.start):
                wide_q, wide_k = q_nrtc[some].float(), k_ntc[some].float()
                wide_grad, wide_v = grad_nrtc[some].float(), v_ntc[some].float()
                sum_k, sum_v = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
                for start, end in tile.rows():
                    rows, grad = (each[some, :, start:end].flatten(1, 2) for each in (q_nrtc, grad_nrtc))
                    p = tile.probabilities(wide_q, wide_k, start, end)
                    sum_v[:, :end] += torch.bmm(tile.narrow(p).mT, grad)
                    ds = tile.narrow(tile.score_gradients(p, wide_grad, wide_v, start, end).mul_(ctx.scale))
                    _put(dq[some, :, start:end], torch.bmm(ds, k_ntc[some, :end]))
                    sum_k[:, :end] += torch.bmm(ds.mT, rows)
                dk[some], dv[some] = sum_k, sum_v

        _all_heads(gradients, q_nrtc)
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape), None


class _Tile:
    """Some rows of some key-value heads: which, and memory that all of them use in turn (n, r · rows, end)."""

    def __init__(self, q_nrtc: Tensor, scale: float) -> None:
        self.scale = scale
        self.n, self.shared, self.length = q_nrtc.shape[:3]
        self.together = min(self.n, max(1, _SCORES // (self.shared * _ROWS * self.length)))
        size = self.together * self.shared * min(_ROWS, self.length) * self.length
        self.scores, self.results = (q_nrtc.new_empty(size, dtype=torch.float32) for _ in range(2))
        self.narrowed = q_nrtc.new_empty(size)
        self.later = self.scores.new_full((_ROWS, _ROWS), -torch.inf).triu_(1)

    def heads(self, first: int) -> Iterator[slice]:
        """Where those of a tile are among all, of which its own begin at `first`."""
        return (slice(first + i, first + min(i + self.together, self.n)) for i in range(0, self.n, self.together))

    def rows(self) -> Iterator[tuple[int, int]]:
        """Where the rows of a tile start and end."""
        return ((start, min(start + _ROWS, self.length)) for start in range(0, self.length, _ROWS))

    def probabilities(self, q_nrtc: Tensor, k_ntc: Tensor, start: int, end: int) -> Tensor:
        rows = end - start
        shape = (len(k_ntc), self.shared * rows, end)
        scores = _view(self.scores, shape)
        queries, keys = q_nrtc[:, :, start:end].flatten(1, 2), k_ntc[:, :end].mT
        torch.baddbmm(scores, queries, keys, beta=0, alpha=self.scale, out=scores)
        scores.unflatten(1, (-1, rows))[..., start:] += self.later[:rows, :rows]
        return torch.softmax(scores, -1, out=_view(self.results, shape))

    def score_gradients(self, p: Tensor, grad_nrtc: Tensor, v_ntc: Tensor, start: int, end: int) -> Tensor:
        """p and its memory are used up."""
        grads = grad_nrtc[:, :, start:end].flatten(1, 2)
        dp = torch.bmm(grads, v_ntc[:, :end].mT, out=_view(self.scores, p.shape))
        dp -= torch.linalg.vecdot(dp, p).unsqueeze(-1)
        return p.mul_(dp)

    def narrow(self, x: Tensor) -> Tensor:
        """As products read it; gone with the next one."""
        return _view(self.narrowed, x.shape).copy_(x)


def _all_heads(function: Callable[[slice], None], q_nrtc: Tensor) -> None:
    """`function` for some of the key-value heads on each core, or here for all where that would not pay."""
    count = len(q_nrtc)
    if torch.compiler.is_compiling():  # neither threads nor settings belong in a graph
        function(slice(0, count))
        return
    cores = torch.get_num_threads()
    each = -(-count // cores)
    with _rounded_operands():
        if cores == 1 or q_nrtc.numel() * q_nrtc.shape[2] < _ENOUGH:
            function(slice(0, count))
        else:
            on_cores(function, [slice(first, min(first + each, count)) for first in range(0, count, each)])


@contextlib.contextmanager
def _rounded_operands() -> Iterator[None]:
    """FP32 products whose operands are BF16 numbers, as all here are: multiplied as such where a processor can.

    In 0.17 instead of 0.33 ms for 32 heads × 64 rows × 256 keys of 32. Sums are FP32; results were the same to the bit.
    """
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def _view(memory: Tensor, shape: Sequence[int]) -> Tensor:
    return memory[: math.prod(shape)].view(shape)


def _folded(x_bhtc: Tensor, groups: int) -> Tensor:
    """Heads that share keys side by side: (b · g, r, t, c)."""
    batch, heads, length, features = x_bhtc.shape
    return x_bhtc.reshape(batch * groups, heads // groups, length, features)


def _by_keys(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (n, r, t, c), k (n, t, c), v (n, t, c_v) for n = b · g."""
    return _folded(q, k.shape[1]), k.flatten(0, 1), v.flatten(0, 1)


def _put(target_nrtc: Tensor, rows: Tensor) -> None:
    target_nrtc.copy_(rows.view(target_nrtc.shape))
