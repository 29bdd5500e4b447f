"""The experts of each token, and the tokens of each expert, by routing.c: what torch's sorting does, to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.kernels.cpu import library


def takes(x: Tensor) -> bool:
    """Whether they are used for scores, or for choices."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.int64) and library.in_use() is not None


@torch.library.custom_op("moe_train::top_experts", mutates_args=())
def top_experts(scores_te: Tensor, k: int) -> Tensor:
    """(t, k) int64: the experts of the k highest scores, the highest first, the lower expert of equal ones."""
    expert_tk: Tensor = _like_choice(scores_te, k)
    scores_te = scores_te.contiguous()
    library.call("top_experts", *scores_te.shape, k, scores_te, expert_tk)
    return expert_tk


@top_experts.register_fake
def _like_choice(scores_te: Tensor, k: int) -> Tensor:
    return scores_te.new_empty(len(scores_te), k, dtype=torch.int64)


@torch.library.custom_op("moe_train::sort_by_expert", mutates_args=())
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
