"""The mixture-of-experts layer of DeepSeekMoE (arXiv 2401.06066): fine-grained routed experts beside shared ones.

All routed experts are two stacked tensors and two grouped matmuls. The gate value multiplies the activation before the
down-projection rather than the output after it: the same sum, on the narrower tensor.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moe_train.config import MoEConfig
from moe_train.kernels.cpu import experts as compiled
from moe_train.model import dispatch, slots
from moe_train.model.balancing import batch_balance_loss, router_z_loss, sequence_balance_loss
from moe_train.model.layers import SwiGLU, in_compute_format
from moe_train.model.router import Choice, Router
from moe_train.precision.fp8 import Fp8Layer
from moe_train.precision.matmul import swiglu_linear
from moe_train.precision.remade import remade


class Routed(NamedTuple):
    """What an MoE layer says of a batch beside its hidden states, padding left out."""

    auxiliary_loss: Tensor  # weighted, summed over the tokens of the batch; 0 where no such loss is on
    counts_e: Tensor  # int64: tokens that chose each expert, dropped ones included
    dropped: Tensor  # pairs that got no place over top_k (with expert choice: tokens); 0 where dropless


class Products(Protocol):
    """Rows (n, d) sorted by expert, their gates (n, 1) and where each expert's rows end → outputs (n, d)."""

    def __call__(self, x_nd: Tensor, gate_n1: Tensor, ends_e: Tensor, /) -> Tensor: ...


class Exchange(Protocol):
    """Products with experts that other processes hold too: parallel/expert_exchange.py."""

    def __call__(self, x_nd: Tensor, gate_n1: Tensor, ends_e: Tensor, products: Products, may_round: bool, /) -> Tensor:
        """`may_round`: this pass may be in FP8, as in training."""


class Experts(nn.Module):
    """The routed experts, each a SwiGLU of width f: gate_up_proj (e, 2f, d), down_proj (e, d, f)."""

    fp8: tuple[Fp8Layer, Fp8Layer] | None = None  # of the two products, given by precision/recipes.py
    evaluates_in_fp8 = False
    exchange: Exchange | None = None  # where a process has a part of them

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        width = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, hidden_size, width))

    def forward(self, x_nd: Tensor, gate_n1: Tensor, ends_e: Tensor) -> Tensor:
        """Rows sorted by expert, and the gate value of each → their gated outputs (n, d)."""
        if self.exchange is not None:
            return self.exchange(x_nd, gate_n1, ends_e, self._products, self._may_round)
        return self._products(x_nd, gate_n1, ends_e)

    def of_tokens(self, x_td: Tensor, gate_n1: Tensor, plan: dispatch.Plan) -> Tensor:
        """Each token through the experts of `plan`, their gated outputs summed: (t, d)."""
        multiplies_here = self.exchange is None and (self.fp8 is None or not self._may_round)
        if multiplies_here and compiled.takes(x_td, self.gate_up_proj, self.down_proj):
            gate_n1, places = gate_n1.to(x_td.dtype), (plan.ends_e, plan.token_n, plan.place_tk)
            out: Tensor = compiled.SwiGLUOfTokens.apply(x_td, self.gate_up_proj, self.down_proj, gate_n1, *places)  # type: ignore[no-untyped-call]
            return out
        rows_nd = remade(lambda x: dispatch.to_experts(x, plan), x_td)
        return dispatch.from_experts(self(rows_nd, gate_n1, plan.ends_e), plan)

    @property
    def _may_round(self) -> bool:
        return self.training or self.evaluates_in_fp8

    def _products(self, x_nd: Tensor, gate_n1: Tensor, ends_e: Tensor) -> Tensor:
        fp8 = self.fp8 if self._may_round else None
        return swiglu_linear(x_nd, self.gate_up_proj, self.down_proj, row_weight=gate_n1, ends_e=ends_e, fp8=fp8)


class MoELayer(nn.Module):
    """Shared experts on every token plus routed ones on those that go there: (b, t, d) → (b, t, d)."""

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config, hidden_size)
        self.experts = Experts(config, hidden_size)
        # Shared experts are always all on, so one SwiGLU of their joint width computes the same sum.
        shared_width = config.num_shared_experts * config.moe_intermediate_size
        self.shared_experts = SwiGLU(hidden_size, shared_width) if shared_width else None

    def forward(self, x_btd: Tensor, real_bt: Tensor | None = None) -> tuple[Tensor, Routed]:
        """real_bt: False for padding, which is computed like the rest and counted nowhere; None: there is none."""
        c = self.config
        x_td = x_btd.flatten(0, 1)
        if real_bt is None:
            real_bt = torch.ones(x_btd.shape[:2], dtype=torch.bool, device=x_btd.device)
        real_t = real_bt.flatten()
        logits_te, scores_te = self.router(x_td)
        x_td = in_compute_format(x_td)
        auxiliary = x_td.new_zeros((), dtype=torch.float32)
        if self.training and c.router_z_loss_weight:
            auxiliary = auxiliary + router_z_loss(logits_te, real_t, c.router_z_loss_weight)
        if c.routing == "expert_choice":
            y_td, counts_e, dropped = self._through_slots(x_td, slots.by_experts(scores_te, real_t, c))
        else:
            choice = self.router.choose_experts(scores_te)
            if c.capacity_factor is None or not self.training:
                y_td, counts_e, dropped = self._dropless(x_td, real_t, choice)
            else:
                y_td, counts_e, dropped = self._through_slots(x_td, slots.by_tokens(choice, real_t, c))
            if self.training and c.sequence_loss_weight:
                loss = sequence_balance_loss(scores_te, choice.expert_tk, real_bt, c.sequence_loss_weight)
                auxiliary = auxiliary + loss
            if self.training and c.batch_loss_weight:
                auxiliary = auxiliary + batch_balance_loss(scores_te, counts_e, real_t, c.batch_loss_weight)
        if self.shared_experts is not None:
            y_td = y_td + self.shared_experts(x_td)
        return y_td.view_as(x_btd), Routed(auxiliary, counts_e, dropped)

    def _dropless(self, x_td: Tensor, real_t: Tensor, choice: Choice) -> tuple[Tensor, Tensor, Tensor]:
        plan = dispatch.plan(choice.expert_tk, real_t, self.config.num_experts)
        gate_n1 = dispatch.gates_to_experts(choice.gate_tk, plan)
        y_td = self.experts.of_tokens(x_td, gate_n1, plan)
        return y_td, plan.counts_e, x_td.new_zeros((), dtype=torch.float32)

    def _through_slots(self, x_td: Tensor, places: slots.Slots) -> tuple[Tensor, Tensor, Tensor]:
        rows_nd = remade(lambda x: slots.to_experts(x, places), x_td)
        y_nd = self.experts(rows_nd, places.gate_n1, places.ends_e)
        return slots.from_experts(y_nd, places, len(x_td)), places.counts_e, places.dropped
