"""The gate of DeepSeek-V3: sigmoid affinities, a bias that steers only the choice, gate values from the affinities.

arXiv 2412.19437, equations 12 to 16. Runs in FP32 whatever the precision: a rounded affinity can change the choice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.config import MoEConfig


class Routing(NamedTuple):
    """Where each of t tokens goes."""

    expert_tk: Tensor  # int64, the experts chosen
    gate_tk: Tensor  # FP32, what their outputs are multiplied by
    affinity_te: Tensor  # FP32, the sigmoid scores of all experts, without the bias


class Router(nn.Module):
    """Chooses top_k of num_experts for every token."""

    selection_bias: Tensor

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        # Moved by balancing.update_selection_bias, never by a gradient; part of the weights that are saved.
        self.register_buffer("selection_bias", torch.zeros(config.num_experts))

    def forward(self, x_td: Tensor) -> Routing:
        with torch.autocast(x_td.device.type, enabled=False):
            affinity_te = torch.sigmoid(F.linear(x_td.to(self.weight.dtype), self.weight))
        expert_tk = (affinity_te.detach() + self.selection_bias).topk(self.config.top_k, dim=-1).indices
        gate_tk = affinity_te.gather(-1, expert_tk)
        if self.config.norm_topk_prob:
            gate_tk = gate_tk / (gate_tk.sum(-1, keepdim=True) + 1e-20)
        return Routing(expert_tk, gate_tk * self.config.routed_scaling_factor, affinity_te)
