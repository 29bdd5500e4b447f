"""The experts of each token, and the tokens of each expert, by routing.c: what torch's sorting does, to the bit."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from moe_train.kernels.cpu import library
from moe_train.uncompiled import operator

_TOKENS = 128  # of a part of a sequence
_SIZES = ("tokens", "experts", "k", "length", "parts")
_TENSORS = ("next", "scores", "logits", "bias", "real", "expert", "chosen", "share")
_BACKWARD = ("grad_chosen", "grad_share", "grad_logits")


class _Choice(ctypes.Structure):
    """`Choice` in routing.c."""

    _fields_ = [(name, ctypes.c_int64) for name in _SIZES] + [(n, ctypes.c_void_p) for n in _TENSORS + _BACKWARD]


def takes(x: Tensor) -> bool:
    """Whether they are used for scores, or for choices."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.int64) and library.in_use() is not None


class Chosen(torch.autograd.Function):
    """Logits (t, e) and the selection bias (e) → the k experts of every token (t, k), their scores (t, k), and the sums
    over each sequence's real tokens of what share each expert has of a token's scores (b, e).

    Scores are sigmoids of the logits; experts are chosen by score plus bias. real_bt: bool, t = b · its length.
    """

    @staticmethod
    def forward(ctx: Any, logits_te: Tensor, bias_e: Tensor, real_bt: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        expert_tk, score_tk, share_be = choose_experts(logits_te, bias_e, real_bt, k)
        ctx.save_for_backward(logits_te, real_bt, expert_tk)
        ctx.mark_non_differentiable(expert_tk)
        ctx.set_materialize_grads(False)
        return expert_tk, score_tk, share_be

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None]:
        logits_te, real_bt, expert_tk = ctx.saved_tensors
        grad: Tensor = chosen_gradient(logits_te, real_bt, expert_tk, grads[1], grads[2])
        return grad, None, None, None


def _call(name: str, rows_te: Tensor, real_bt: Tensor, k: int, **tensors: Tensor | None) -> None:
    held = {key: each.contiguous() for key, each in tensors.items() if each is not None}
    real = real_bt.contiguous()
    length = max(1, real_bt.shape[1])
    places = {key: each.data_ptr() for key, each in held.items()}
    tokens, experts = rows_te.shape
    sizes = {"tokens": tokens, "experts": experts, "k": k, "length": length, "parts": _parts(length)}
    library.call_on_cores(name, _Choice(**sizes, real=real.data_ptr(), **places))


def _parts(length: int) -> int:
    return max(1, length // _TOKENS)


@operator("moe_train::choose_experts")
def choose_experts(logits_te: Tensor, bias_e: Tensor, real_bt: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    expert_tk, score_tk, share_be = _like_choice(logits_te, bias_e, real_bt, k)
    parts = logits_te.new_empty(len(real_bt), _parts(real_bt.shape[1]), logits_te.shape[1])
    tensors = {"logits": logits_te, "bias": bias_e, "expert": expert_tk, "chosen": score_tk, "share": parts}
    _call("choose_experts", logits_te, real_bt, k, **tensors)
    torch.sum(parts, 1, out=share_be)
    return expert_tk, score_tk, share_be


@choose_experts.register_fake
def _like_choice(logits_te: Tensor, bias_e: Tensor, real_bt: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    expert_tk = logits_te.new_empty(len(logits_te), k, dtype=torch.int64)
    return expert_tk, logits_te.new_empty(len(logits_te), k), logits_te.new_empty(len(real_bt), logits_te.shape[1])


@operator("moe_train::chosen_gradient")
def chosen_gradient(
    logits_te: Tensor, real_bt: Tensor, expert_tk: Tensor, grad_tk: Tensor | None, grad_be: Tensor | None
) -> Tensor:
    grad_te: Tensor = _like_logits(logits_te, real_bt, expert_tk, grad_tk, grad_be)
    tensors = {"logits": logits_te, "expert": expert_tk, "grad_chosen": grad_tk, "grad_share": grad_be}
    _call("chosen_gradient", logits_te, real_bt, expert_tk.shape[1], grad_logits=grad_te, **tensors)
    return grad_te


@chosen_gradient.register_fake
def _like_logits(
    logits_te: Tensor, real_bt: Tensor, expert_tk: Tensor, grad_tk: Tensor | None, grad_be: Tensor | None
) -> Tensor:
    return logits_te.new_empty(logits_te.shape)


@operator("moe_train::top_experts")
def top_experts(scores_te: Tensor, k: int) -> Tensor:
    """(t, k) int64: the experts of the k highest scores, the highest first, the lower expert of equal ones."""
    expert_tk: Tensor = _like_top(scores_te, k)
    real = scores_te.new_ones(1, len(scores_te), dtype=torch.bool)
    _call("choose_experts", scores_te, real, k, scores=scores_te, expert=expert_tk)
    return expert_tk


@top_experts.register_fake
def _like_top(scores_te: Tensor, k: int) -> Tensor:
    return scores_te.new_empty(len(scores_te), k, dtype=torch.int64)


@operator("moe_train::sort_by_expert")
def sort_by_expert(
    expert_tk: Tensor, real_t: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What model/dispatch.py's Plan is made of."""
    made: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _like_plan(expert_tk, real_t, num_experts)
    (tokens, k), tensors = expert_tk.shape, (expert_tk.contiguous(), real_t.contiguous(), *made)
    library.call("sort_by_expert", tokens, num_experts, k, *tensors)
    return made


@sort_by_expert.register_fake
def _like_plan(expert_tk: Tensor, real_t: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    pairs = expert_tk.numel()
    return (
        expert_tk.new_empty(pairs),
        expert_tk.new_empty(pairs),
        expert_tk.new_empty(expert_tk.shape),
        expert_tk.new_empty(num_experts, dtype=torch.int32),
        expert_tk.new_empty(num_experts),
    )
