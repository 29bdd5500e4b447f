"""Keeping experts evenly loaded, and saying how evenly they are.

The selection bias follows the load without touching the gradient (auxiliary-loss-free balancing, arXiv 2408.15664,
algorithm 1); the sequence-wise loss guards against extremes within one sequence (arXiv 2412.19437, equations 17 to 20);
the batch-wise loss is the older way (Switch, GShard). Each loss is per MoE layer, and those of all layers are added.
A loss is summed over tokens, as many times its mean as there are, so that micro-batches and ranks can be added; padding
is left out of it. The batch-wise loss alone is not the same however a batch is cut: its shares are of a micro-batch.
Loads are counted by the forward pass and handed on as results, never kept in modules: so a token recomputed under
activation checkpointing is still counted once, and counts can be summed over micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.model.router import Router


def sequence_balance_loss(sum_be: Tensor, expert_tk: Tensor, real_bt: Tensor, weight: float) -> Tensor:
    """alpha · sum_i f_i P_i of each sequence times its tokens, over all sequences; a token's minimum is alpha.

    f_i is expert i's share of the sequence's choices times num_experts, P_i its mean normalised score: sum_be are the
    router's `sequence_shares`. real_bt: False for padding, which belongs to neither.
    """
    num_experts = sum_be.shape[-1]
    real_t1 = real_bt.reshape(-1, 1).to(sum_be.dtype)
    tokens_b1 = real_bt.sum(1, keepdim=True).clamp_min(1)
    chosen_bn = expert_tk.reshape(len(real_bt), -1)
    ones_bn = real_t1.expand(expert_tk.shape).reshape(chosen_bn.shape)
    f_be = torch.zeros_like(sum_be).scatter_add_(1, chosen_bn, ones_bn)
    f_be = f_be * (num_experts / expert_tk.shape[1]) / tokens_b1
    loss: Tensor = weight * (f_be * sum_be).sum()
    return loss


def batch_balance_loss(scores_te: Tensor, counts_e: Tensor, real_t: Tensor, weight: float) -> Tensor:
    """alpha · sum_i f_i P_i of the micro-batch of all ranks (Switch, arXiv 2101.03961, equations 4 to 6; 2501.11873).

    The shares f_i are those of all ranks, P_i is summed over this rank's tokens, so that the ranks' losses, and their
    gradients, add up to those of one batch. f_i of the whole batch would have to be known before its first micro-batch
    goes backward, so each micro-batch has its own. counts_e: how often each expert was chosen on this rank; real_t:
    False for padding.
    """
    counts = counts_e.to(scores_te.dtype)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
    share_te = scores_te / scores_te.sum(-1, keepdim=True) * real_t.unsqueeze(1)
    loss: Tensor = weight * len(counts) * (counts / counts.sum().clamp_min(1) * share_te.sum(0)).sum()
    return loss


def router_z_loss(logits_te: Tensor, real_t: Tensor, weight: float) -> Tensor:
    """The squared log-sum-exp of the router's logits (ST-MoE, arXiv 2202.08906, equation 5), summed over tokens."""
    loss: Tensor = weight * (logits_te.logsumexp(-1).square() * real_t).sum()
    return loss


@torch.no_grad()
def update_selection_bias(routers: Sequence[Router], counts_le: Tensor, speed: float) -> None:
    """Raise the bias of experts that got less than the mean of the step's tokens by `speed`, lower that of the others.

    counts_le: tokens each expert of each MoE layer received in one optimizer step, over all micro-batches and ranks.
    """
    counts = counts_le.to(torch.float32)
    steps_le = speed * torch.sign(counts.mean(-1, keepdim=True) - counts)
    if routers:  # a model can be dense throughout
        torch._foreach_add_([router.selection_bias for router in routers], steps_le.unbind())


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
