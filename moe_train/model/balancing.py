"""Keeping experts evenly loaded, and saying how evenly they are.

The selection bias follows the load without touching the gradient (auxiliary-loss-free balancing, arXiv 2408.15664,
algorithm 1); the sequence-wise loss guards against extremes within one sequence (arXiv 2412.19437, equations 17 to 20);
the batch-wise loss is the older way (Switch, GShard). Each loss is per MoE layer, and those of all layers are added.
Loads are counted by the forward pass and handed on as results, never kept in modules: so a token recomputed under
activation checkpointing is still counted once, and counts can be summed over micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.model.router import Router


def sequence_balance_loss(scores_te: Tensor, expert_tk: Tensor, num_sequences: int, weight: float) -> Tensor:
    """alpha · sum_i f_i P_i, summed over the sequences of the batch; each sequence's minimum is alpha.

    f_i is expert i's share of the sequence's choices times num_experts, P_i its mean normalised score.
    """
    share_te = scores_te / scores_te.sum(-1, keepdim=True)
    p_be: Tensor = share_te.unflatten(0, (num_sequences, -1)).mean(1)
    chosen_bn = expert_tk.reshape(num_sequences, -1)
    ones = torch.ones_like(chosen_bn, dtype=p_be.dtype)
    f_be = torch.zeros_like(p_be).scatter_add_(1, chosen_bn, ones) * (p_be.shape[-1] / chosen_bn.shape[1])
    loss: Tensor = weight * (f_be * p_be).sum()
    return loss


def batch_balance_loss(scores_te: Tensor, counts_e: Tensor, weight: float) -> Tensor:
    """alpha · sum_i f_i P_i of the micro-batch of all ranks (Switch, arXiv 2101.03961, equations 4 to 6; 2501.11873).

    The shares f_i are those of all ranks; P_i is this rank's, so that the mean of the ranks' losses, and of their
    gradients, is that of one batch. counts_e: how often each expert was chosen on this rank.
    """
    counts = counts_e.to(scores_te.dtype)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
    share_te = scores_te / scores_te.sum(-1, keepdim=True)
    loss: Tensor = weight * len(counts) * (counts / counts.sum() * share_te.mean(0)).sum()
    return loss


def router_z_loss(logits_te: Tensor, weight: float) -> Tensor:
    """The mean over tokens of the squared log-sum-exp of the router's logits (ST-MoE, arXiv 2202.08906, equation 5)."""
    return weight * logits_te.logsumexp(-1).square().mean()


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
