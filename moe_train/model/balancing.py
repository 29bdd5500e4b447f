"""Keeping experts evenly loaded, and saying how evenly they are.

The selection bias follows the load without touching the gradient (auxiliary-loss-free balancing, arXiv 2408.15664,
algorithm 1); the sequence-wise loss guards against extremes within one sequence (arXiv 2412.19437, equations 17 to 20).
Loads are counted by the forward pass and handed on as results, never kept in modules: so a token recomputed under
activation checkpointing is still counted once, and counts can be summed over micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_train.model.router import Router, Routing


def sequence_balance_loss(routing: Routing, num_sequences: int, weight: float) -> Tensor:
    """alpha · sum_i f_i P_i, summed over the sequences of the batch; each sequence's minimum is alpha.

    f_i is expert i's share of the sequence's choices times num_experts, P_i its mean normalised affinity.
    """
    affinity_te = routing.affinity_te
    num_experts = affinity_te.shape[-1]
    share_te = affinity_te / affinity_te.sum(-1, keepdim=True)
    p_be: Tensor = share_te.unflatten(0, (num_sequences, -1)).mean(1)
    chosen_bn = routing.expert_tk.reshape(num_sequences, -1)
    ones = torch.ones_like(chosen_bn, dtype=p_be.dtype)
    f_be = torch.zeros_like(p_be).scatter_add_(1, chosen_bn, ones) * (num_experts / chosen_bn.shape[1])
    loss: Tensor = weight * (f_be * p_be).sum()
    return loss


@torch.no_grad()
def update_selection_bias(routers: Sequence[Router], counts_le: Tensor, speed: float) -> None:
    """Raise the bias of experts that got less than the mean of the step's tokens by `speed`, lower that of the others.

    counts_le: tokens each expert of each MoE layer received in one optimizer step, over all micro-batches and ranks.
    """
    counts = counts_le.to(torch.float32)
    steps_le = speed * torch.sign(counts.mean(-1, keepdim=True) - counts)
    for router, step_e in zip(routers, steps_le, strict=True):
        router.selection_bias += step_e


def load_statistics(counts_le: Tensor) -> dict[str, float]:
    """How even the load of each layer is, under the metric names of a run. Synchronises with the device.

    max_violation: (largest load - mean) / mean, the MaxVio of arXiv 2408.15664; load_entropy: of the load's
    distribution, 1 when even; dead_experts: how many got no token, over all layers. The headline figures are the worst
    layer's violation and the mean entropy.
    """
    counts = counts_le.to("cpu", torch.float64)
    mean = counts.mean(-1)
    violation = (counts.amax(-1) - mean) / mean.clamp_min(1e-12)
    share = counts / counts.sum(-1, keepdim=True).clamp_min(1e-12)
    num_experts = counts.shape[-1]
    entropy = -torch.xlogy(share, share).sum(-1) / torch.log(torch.tensor(max(num_experts, 2), dtype=torch.float64))
    dead = (counts == 0).sum(-1)
    figures = {
        "moe/max_violation": violation.max().item(),
        "moe/load_entropy": entropy.mean().item(),
        "moe/dead_experts": float(dead.sum().item()),
    }
    for layer in range(len(counts)):
        figures[f"moe/layer_{layer}/max_violation"] = violation[layer].item()
        figures[f"moe/layer_{layer}/load_entropy"] = entropy[layer].item()
        figures[f"moe/layer_{layer}/dead_experts"] = float(dead[layer].item())
    return figures
