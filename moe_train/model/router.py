"""Which experts a token goes to, and with what weight.

The affinities are sigmoid or softmax scores of a linear layer, whose operands are never rounded to the compute format:
that would change a choice in a hundred. In BF16 a GPU multiplies them as TF32, everything else as FP32. Tokens then
choose experts (DeepSeek-V3, arXiv 2412.19437, equations 12 to 16, groups included), or experts choose tokens (arXiv
2202.09368).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.config import MoEConfig
from moe_train.kernels.cpu import router as compiled_linear
from moe_train.kernels.cpu import routing as compiled
from moe_train.precision.formats import compute_dtype
from moe_train.precision.support import router_in_tf32, runs_triton


class Choice(NamedTuple):
    """The experts of every token."""

    expert_tk: Tensor  # int64
    gate_tk: Tensor  # FP32, what their outputs are multiplied by
    share_be: Tensor | None = None  # `sequence_shares`, where they were asked for and the loss is not there yet
    sequence_loss: Tensor | None = None  # as well
    scores_te: Tensor | None = None  # as well


class TF32Linear(torch.autograd.Function):
    """x (t, d) times weight (e, d) transposed, its gradients too, as products of 10 bits on a GPU that has TF32.

    That changes 0.1% of a trained model's choices, where BF16 in the products before it changes 2% (docs/log.md,
    2026-11-27); a GPU's FP32 units take 0.35 ms for what TF32's take 0.08.
    """

    @staticmethod
    def forward(ctx: Any, x_td: Tensor, weight_ed: Tensor) -> Tensor:
        ctx.save_for_backward(x_td, weight_ed)
        with _tf32():
            return F.linear(x_td, weight_ed)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        x_td, weight_ed = ctx.saved_tensors
        grad_te = grad_outputs[0]
        with torch.autocast(x_td.device.type, enabled=False), _tf32():
            return grad_te @ weight_ed, grad_te.t() @ x_td


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """Products of FP32 matrices on a GPU are of their 10 leading bits."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class Router(nn.Module):
    """Scores all experts for every token, and chooses top_k of them."""

    selection_bias: Tensor

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        # Moved by balancing.update_selection_bias, never by a gradient; part of the weights that are saved.
        self.register_buffer("selection_bias", torch.zeros(config.num_experts))

    def logits(self, x_td: Tensor) -> Tensor:
        in_tf32 = router_in_tf32(x_td.device, compute_dtype(x_td))
        with torch.autocast(x_td.device.type, enabled=False):
            x_td = x_td.to(self.weight.dtype)
            function: Callable[[Tensor, Tensor], Tensor] = F.linear
            if compiled_linear.takes(x_td, self.weight):
                function = compiled_linear.RouterLinear.apply
            elif in_tf32:
                function = TF32Linear.apply
            return function(x_td, self.weight)

    def scores(self, logits_te: Tensor) -> Tensor:
        sigmoid = self.config.scoring_func == "sigmoid"
        return logits_te.sigmoid() if sigmoid else logits_te.softmax(-1)

    def choose(self, logits_te: Tensor, real_bt: Tensor, *, shares: bool = False, scores: bool = False) -> Choice:
        """The top_k experts of every token, from their logits. real_bt: False for padding, which has no share."""
        c = self.config
        plain = c.scoring_func == "sigmoid" and c.topk_group == c.n_group and not scores
        if plain and compiled.takes(logits_te):
            expert_tk, score_tk, share_be = compiled.Chosen.apply(logits_te, self.selection_bias, real_bt, c.top_k)  # type: ignore[no-untyped-call]
            return Choice(expert_tk, self._gates(score_tk), share_be)
        if plain and runs_triton(logits_te.device) and _fits_kernel(logits_te):
            from moe_train.kernels.routing import Choosing, Gating

            weight = c.sequence_loss_weight if shares else 0.0
            gating = Gating(c.top_k, c.norm_topk_prob, c.routed_scaling_factor, weight)
            expert_tk, gate_tk, loss = Choosing.apply(logits_te, self.selection_bias, real_bt, gating)  # type: ignore[no-untyped-call]
            return Choice(expert_tk, gate_tk, sequence_loss=loss)
        scores_te = self.scores(logits_te)
        chosen = self.choose_experts(scores_te)
        return chosen._replace(
            share_be=sequence_shares(scores_te, real_bt) if shares else None, scores_te=scores_te if scores else None
        )

    def choose_experts(self, scores_te: Tensor) -> Choice:
        """The top_k experts of every token by score plus selection bias, gated by their score alone."""
        c = self.config
        biased_te = scores_te.detach() + self.selection_bias
        if c.topk_group < c.n_group:
            biased_te = _within_best_groups(biased_te, c)
        if compiled.takes(biased_te):
            expert_tk = compiled.top_experts(biased_te, c.top_k)
        else:
            expert_tk = biased_te.topk(c.top_k, dim=-1).indices
        return Choice(expert_tk, self._gates(scores_te.gather(-1, expert_tk)))

    def _gates(self, score_tk: Tensor) -> Tensor:
        if self.config.norm_topk_prob:
            score_tk = score_tk / (score_tk.sum(-1, keepdim=True) + 1e-20)
        return score_tk * self.config.routed_scaling_factor


def _fits_kernel(logits_te: Tensor) -> bool:
    from moe_train.kernels.routing import MOST_EXPERTS

    return logits_te.dtype == torch.float32 and logits_te.shape[1] <= MOST_EXPERTS


def sequence_shares(scores_te: Tensor, real_bt: Tensor) -> Tensor:
    """What share each expert has of a token's scores, summed over the real tokens of each sequence: (b, e)."""
    real_t1 = real_bt.reshape(-1, 1).to(scores_te.dtype)
    share_te = scores_te / scores_te.sum(-1, keepdim=True) * real_t1
    sum_be: Tensor = share_te.unflatten(0, real_bt.shape).sum(1)
    return sum_be


def _within_best_groups(biased_te: Tensor, config: MoEConfig) -> Tensor:
    """All but the experts of each token's topk_group best groups at minus infinity.

    A group is worth the sum of its group_score_top_k highest experts, which bounds the devices a token is sent to where
    a group is a device (DeepSeek-V3, section 2.1.2; V2 took the one highest, arXiv 2405.04434, section 2.2.2).
    """
    grouped_tgm = biased_te.unflatten(-1, (config.n_group, -1))
    value_tg = grouped_tgm.topk(config.group_score_top_k, dim=-1).values.sum(-1)
    best = value_tg.topk(config.topk_group, dim=-1).indices
    closed_tg = torch.ones_like(value_tg, dtype=torch.bool).scatter_(-1, best, False)
    within: Tensor = grouped_tgm.masked_fill(closed_tg.unsqueeze(-1), float("-inf")).flatten(-2)
    return within


def choose_tokens(scores_te: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The `capacity` tokens each expert likes best and their scores: (e, c) int64 and (e, c)."""
    score_ec, token_ec = scores_te.t().topk(capacity, dim=-1)
    return token_ec, score_ec
