"""The mixture-of-experts layer of DeepSeekMoE (arXiv 2401.06066): fine-grained routed experts beside shared ones.

All routed experts are two stacked tensors and two grouped matmuls. The gate value multiplies the activation before the
down-projection rather than the output after it: the same sum, on the narrower tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.config import MoEConfig
from moe_train.model import dispatch
from moe_train.model.balancing import sequence_balance_loss
from moe_train.model.layers import SwiGLU
from moe_train.model.router import Router
from moe_train.precision.matmul import grouped_linear


class MoEOutput(NamedTuple):
    hidden_btd: Tensor
    balance_loss: Tensor  # summed over the sequences of the batch; 0 where its weight is
    counts_e: Tensor  # int64: tokens each expert received


class Experts(nn.Module):
    """The routed experts, each a SwiGLU of width f: gate_up_proj (e, 2f, d), down_proj (e, d, f)."""

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        width = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, hidden_size, width))

    def forward(self, x_nd: Tensor, gate_n1: Tensor, ends_e: Tensor) -> Tensor:
        """Rows sorted by expert, and the gate value of each → their gated outputs (n, d)."""
        gate, up = grouped_linear(x_nd, self.gate_up_proj, ends_e).chunk(2, dim=-1)
        hidden_nf = F.silu(gate) * up * gate_n1.to(gate.dtype)
        return grouped_linear(hidden_nf, self.down_proj, ends_e)


class MoELayer(nn.Module):
    """Shared experts on every token plus top_k routed experts: (b, t, d) → (b, t, d), dropless."""

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config, hidden_size)
        self.experts = Experts(config, hidden_size)
        # Shared experts are always all on, so one SwiGLU of their joint width computes the same sum.
        shared_width = config.num_shared_experts * config.moe_intermediate_size
        self.shared_experts = SwiGLU(hidden_size, shared_width) if shared_width else None

    def forward(self, x_btd: Tensor) -> MoEOutput:
        c = self.config
        x_td = x_btd.flatten(0, 1)
        routing = self.router(x_td)
        plan = dispatch.plan(routing.expert_tk, c.num_experts)
        gate_n1 = dispatch.gates_to_experts(routing.gate_tk, plan)
        y_nd = self.experts(dispatch.to_experts(x_td, plan, c.top_k), gate_n1, plan.ends_e)
        y_td = dispatch.from_experts(y_nd, plan, c.top_k)
        if self.shared_experts is not None:
            y_td = y_td + self.shared_experts(x_td)
        balance_loss = x_td.new_zeros((), dtype=torch.float32)
        if self.training and c.sequence_loss_weight:
            balance_loss = sequence_balance_loss(routing, len(x_btd), c.sequence_loss_weight)
        return MoEOutput(y_td.view_as(x_btd), balance_loss, plan.counts_e)
