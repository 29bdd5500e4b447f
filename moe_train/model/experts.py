"""The mixture-of-experts layer of DeepSeekMoE (arXiv 2401.06066): fine-grained routed experts beside shared ones.

All routed experts are two stacked tensors and two grouped matmuls. The gate value multiplies the activation before the
down-projection rather than the output after it: the same sum, on the narrower tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moe_train.config import MoEConfig
from moe_train.kernels import experts as kernels
from moe_train.kernels.cpu import experts as compiled
from moe_train.model import dispatch, slots
from moe_train.model.balancing import batch_balance_loss, router_z_loss, sequence_balance_loss
from moe_train.model.layers import SwiGLU
from moe_train.model.router import Choice, Router
from moe_train.precision.fp8 import Fp8Layer
from moe_train.precision.fp8_swiglu import fp8_swiglu
from moe_train.precision.matmul import swiglu_linear
from moe_train.precision.remade import in_compute_format, remade


class Routed(NamedTuple):
    """What an MoE layer says of a batch beside its hidden states, padding left out."""

    auxiliary_loss: Tensor | None  # weighted, summed over the tokens of the batch; None where no such loss is on
    counts_e: Tensor  # int64: tokens that chose each expert, dropped ones included
    dropped: Tensor | None  # pairs that got no place over top_k (with expert choice: tokens); None where dropless


class Sorted(NamedTuple):
    """Tokens on their way to experts."""

    rows_nd: Tensor  # sorted by expert
    gate_n1: Tensor
    ends_e: Tensor  # int32: where each expert's rows end
    counts_e: Tensor
    dropped: Tensor | None
    collect: Callable[[Tensor], Tensor]  # the experts' outputs (n, d) → their sums (t, d)


class Outputs(NamedTuple):
    """Of an MoE layer's experts."""

    routed_td: Tensor
    shared_td: Tensor | None  # where tokens travelled meanwhile
    counts_e: Tensor
    dropped: Tensor | None
    with_shared: bool = False  # routed_td is the sum with the shared ones already


class Sent(Protocol):
    """Rows that have left for the processes that have their experts."""

    def arrived(self) -> tuple[Tensor, Tensor, Tensor]:
        """Wait for those of the others: rows (m, d) sorted by expert of this process, their gates, where each ends."""

    def back(self, out_md: Tensor, /) -> Tensor:
        """The outputs of those rows → the outputs of the rows that were sent (n, d)."""


class Exchange(Protocol):
    """Between processes that each have some of the experts: parallel/expert_exchange.py."""

    def sent(self, x_nd: Tensor, gate_n1: Tensor, ends_e: Tensor, may_round: bool, /) -> Sent:
        """Begin to send rows, without waiting for them. `may_round`: this pass may be in FP8, as in training."""


class Experts(nn.Module):
    """The routed experts, each a SwiGLU of width f: gate_up_proj (e, 2f, d), down_proj (e, d, f)."""

    fp8: tuple[Fp8Layer, Fp8Layer] | None = None  # of the two products, given by precision/recipes.py
    evaluates_in_fp8 = False

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        width = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, hidden_size, width))

    def forward(self, x_nd: Tensor, gate_n1: Tensor, ends_e: Tensor) -> Tensor:
        """Rows sorted by expert, and the gate value of each → their gated outputs (n, d)."""
        fp8 = self.fp8 if self.may_round else None
        return swiglu_linear(x_nd, self.gate_up_proj, self.down_proj, row_weight=gate_n1, ends_e=ends_e, fp8=fp8)

    def take_tokens(self, x_td: Tensor) -> bool:
        """Whether `of_tokens` can be asked for."""
        if self.fp8 is not None and self.may_round:
            return self.fp8[0].reads_tokens
        return self.add_to_sums(x_td) or compiled.takes(x_td, self.gate_up_proj, self.down_proj)

    def add_to_sums(self, x_td: Tensor) -> bool:
        """Whether `of_tokens` adds what it is given as it sums: on a GPU."""
        return self._wide and kernels.takes(x_td, self.gate_up_proj, self.down_proj)

    def of_tokens(self, x_td: Tensor, gate_n1: Tensor, plan: dispatch.Plan, added_td: Tensor | None = None) -> Tensor:
        """Each token through the experts of `plan`, their gated outputs summed: (t, d). No row is copied for it.

        added_td: added to the sums before they are rounded; where `add_to_sums` says so.
        """
        weights, places = (self.gate_up_proj, self.down_proj), (plan.ends_e, plan.token_n, plan.place_tk)
        out: Tensor
        if self.fp8 is not None and self.may_round:
            out = fp8_swiglu(x_td, *weights, gate_n1, plan.ends_e, self.fp8, plan.token_n, plan.place_tk)
        elif self.add_to_sums(x_td):
            out = kernels.RoutedExperts.apply(x_td, *weights, gate_n1, *places, added_td)  # type: ignore[no-untyped-call]
        else:
            out = compiled.SwiGLUOfTokens.apply(x_td, *weights, gate_n1.to(x_td.dtype), *places)  # type: ignore[no-untyped-call]
        return out

    @property
    def _wide(self) -> bool:
        """Whether products are not in FP8 now."""
        return self.fp8 is None or not self.may_round

    @property
    def may_round(self) -> bool:
        return self.training or self.evaluates_in_fp8


class MoELayer(nn.Module):
    """Shared experts on every token plus routed ones on those that go there: (b, t, d) → (b, t, d)."""

    exchange: Exchange | None = None  # where a process has a part of the routed ones

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config, hidden_size)
        self.experts = Experts(config, hidden_size)
        # Shared experts are always all on, so one SwiGLU of their joint width computes the same sum.
        shared_width = config.num_shared_experts * config.moe_intermediate_size
        self.shared_experts = SwiGLU(hidden_size, shared_width) if shared_width else None

    def forward(
        self, x_btd: Tensor, exact_btd: Tensor | None = None, real_bt: Tensor | None = None
    ) -> tuple[Tensor, Routed]:
        """exact_btd: x in FP32 for the router, where x_btd is rounded already; None: it is x_btd itself.

        real_bt: False for padding, which is computed like the rest and counted nowhere; None: there is none.
        """
        c = self.config
        exact_td, x_td = (
            (x_btd if exact_btd is None else exact_btd).flatten(0, 1),
            in_compute_format(x_btd).flatten(0, 1),
        )
        if real_bt is None:
            real_bt = torch.ones(x_btd.shape[:2], dtype=torch.bool, device=x_btd.device)
        real_t = real_bt.flatten()
        logits_te = self.router.logits(exact_td)
        auxiliary: list[Tensor] = []
        if self.training and c.router_z_loss_weight:
            auxiliary.append(router_z_loss(logits_te, real_t, c.router_z_loss_weight))
        if c.routing == "expert_choice":
            places = slots.by_experts(self.router.scores(logits_te), real_t, c)
            y_td, shared_td, counts_e, dropped, with_shared = self._outputs(_in_slots(x_td, places), x_td)
        else:
            by_sequence, by_batch = (
                self.training and weight > 0 for weight in (c.sequence_loss_weight, c.batch_loss_weight)
            )
            choice = self.router.choose(logits_te, real_bt, shares=by_sequence, scores=by_batch)
            if c.capacity_factor is None or not self.training:
                plan = dispatch.plan(choice.expert_tk, real_t, c.num_experts)
                y_td, shared_td, counts_e, dropped, with_shared = self._dropless(x_td, choice, plan)
            else:
                places = slots.by_tokens(choice, real_t, c)
                y_td, shared_td, counts_e, dropped, with_shared = self._outputs(_in_slots(x_td, places), x_td)
            if choice.sequence_loss is not None:
                auxiliary.append(choice.sequence_loss)
            elif choice.share_be is not None and by_sequence:
                loss = sequence_balance_loss(choice.share_be, choice.expert_tk, real_bt, c.sequence_loss_weight)
                auxiliary.append(loss)
            if by_batch and choice.scores_te is not None:
                auxiliary.append(batch_balance_loss(choice.scores_te, counts_e, real_t, c.batch_loss_weight))
        if self.shared_experts is not None and not with_shared:
            y_td = y_td + (self.shared_experts(x_td) if shared_td is None else shared_td)
        auxiliary_loss = functools.reduce(torch.add, auxiliary) if auxiliary else None
        return y_td.view_as(x_btd), Routed(auxiliary_loss, counts_e, dropped)

    def _dropless(self, x_td: Tensor, choice: Choice, plan: dispatch.Plan) -> Outputs:
        gate_n1 = dispatch.gates_to_experts(choice.gate_tk, plan)
        if self.exchange is None and self.experts.take_tokens(x_td):
            added_td = None
            if self.shared_experts is not None and self.experts.add_to_sums(x_td):
                added_td = self.shared_experts(x_td)
            y_td = self.experts.of_tokens(x_td, gate_n1, plan, added_td)
            return Outputs(y_td, None, plan.counts_e, None, with_shared=added_td is not None)
        rows_nd = remade(lambda x: dispatch.to_experts(x, plan), x_td)
        collect = lambda y_nd: dispatch.from_experts(y_nd, plan)  # noqa: E731
        return self._outputs(Sorted(rows_nd, gate_n1, plan.ends_e, plan.counts_e, None, collect), x_td)

    def _outputs(self, to: Sorted, x_td: Tensor) -> Outputs:
        """The backward pass takes the nodes that were made last first: there the gradients of tokens travel while those
        of the shared experts are computed.
        """
        if self.exchange is None:  # shared experts come later, when there are fewer tensors
            y_nd, shared_td = self.experts(to.rows_nd, to.gate_n1, to.ends_e), None
        else:
            sent = self.exchange.sent(to.rows_nd, to.gate_n1, to.ends_e, self.experts.may_round)
            shared_td = None if self.shared_experts is None else self.shared_experts(x_td)
            y_nd = sent.back(self.experts(*sent.arrived()))
        return Outputs(to.collect(y_nd), shared_td, to.counts_e, to.dropped)


def _in_slots(x_td: Tensor, places: slots.Slots) -> Sorted:
    rows_nd = remade(lambda x: slots.to_experts(x, places), x_td)
    return Sorted(
        rows_nd,
        places.gate_n1,
        places.ends_e,
        places.counts_e,
        places.dropped,
        lambda y_nd: slots.from_experts(y_nd, places),
    )
