"""Cross-entropy of the output head, fused with its matrix product so that the logits never exist whole.

At 4,096 vocabulary entries the logits of a batch are the largest tensor of a small model and every pass over them goes
to memory. Here they are made a part of the rows at a time, and the gradients of hidden states and head weight are
computed in the same visit (two products more), so the forward is the whole cost and nothing is kept but those
gradients. In BF16 on a CPU that multiplies it the visit is one of kernels/cpu/head.c. Elsewhere the products are
torch's, and what lies between them is a kernel's on a GPU (kernels/head.py) and torch's otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_train.kernels.cpu import head
from moe_train.precision.formats import compute_dtype
from moe_train.precision.matmul import linear
from moe_train.precision.narrowed import narrowed
from moe_train.precision.support import runs_triton

IGNORE = -100  # target of padding
# Logits alive at a time. On a CPU 512 rows at 4,096 entries were fastest of 128 … 4,096; a GPU wants large products
CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_td: Tensor, weight_vd: Tensor, target_t: Tensor, z_loss_weight: float, needs_grad: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(hidden_td)
        hidden = hidden_td.to(dtype)
        if dtype is torch.bfloat16 and head.takes(hidden, weight_vd):
            function = head.head_loss_and_gradients if needs_grad else head.head_loss
            objective, nll, *gradients = function(hidden, weight_vd, target_t, z_loss_weight)
        else:
            weight = narrowed(dtype, weight_vd)
            objective, nll, *gradients = _by_chunks(hidden, weight, target_t, z_loss_weight, needs_grad)
        if gradients:
            ctx.save_for_backward(gradients[0].to(hidden_td.dtype), gradients[1].to(weight_vd.dtype))
        ctx.mark_non_differentiable(nll)
        return objective, nll

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_outputs[0], grad_weight * grad_outputs[0], None, None, None


def _by_chunks(
    hidden: Tensor, weight: Tensor, target_t: Tensor, z_loss_weight: float, needs_grad: bool
) -> tuple[Tensor, ...]:
    """With torch's products: objective, loss and, where needed, the gradients of hidden states and weight."""
    dtype = hidden.dtype
    accumulate = torch.float32 if dtype.itemsize < 4 else dtype
    grad_hidden = torch.empty_like(hidden) if needs_grad else None
    grad_weight = torch.zeros_like(weight, dtype=accumulate) if needs_grad else None
    nll = hidden.new_zeros((), dtype=accumulate)
    objective = hidden.new_zeros((), dtype=accumulate)
    visit = _by_kernel if accumulate == torch.float32 and runs_triton(hidden.device) else _by_operations
    rows = max(1, CHUNK_ELEMENTS["cuda" if hidden.is_cuda else "cpu"] // len(weight))
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        part_nll, square, grad = visit(linear(hidden[part], weight), target_t[part], z_loss_weight, needs_grad)
        nll += part_nll
        objective += part_nll + z_loss_weight * square
        if grad is not None and grad_hidden is not None and grad_weight is not None:
            torch.mm(grad, weight, out=grad_hidden[part])
            if visit is _by_kernel and grad.is_cuda and dtype.itemsize < 4:  # sums of a chunk not rounded on their way
                grad_weight += torch.mm(grad.t(), hidden[part], out_dtype=accumulate)
            else:
                grad_weight += torch.mm(grad.t(), hidden[part])
    if grad_hidden is None or grad_weight is None:
        return objective, nll
    return objective, nll, grad_hidden, grad_weight


def _by_operations(
    logits: Tensor, target_t: Tensor, z_loss_weight: float, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums over a chunk of the loss and of lse², and the gradient of logits where needed, in the format of these."""
    dtype = logits.dtype
    accumulate = torch.float32 if dtype.itemsize < 4 else dtype
    target = target_t.unsqueeze(1)
    counted = (target != IGNORE).to(accumulate)
    target = target.clamp_min(0)
    logits = logits.to(accumulate)
    lse = torch.logsumexp(logits, -1, keepdim=True)
    nll = ((lse - logits.gather(1, target)) * counted).sum()
    square = (lse.square() * counted).sum()
    if not needs_grad:
        return nll, square, None
    # d/dlogits of nll + z·lse² is p·(1 + 2z·lse) - onehot.
    grad = logits.sub_(lse).exp_().mul_((1 + 2 * z_loss_weight * lse) * counted)
    return nll, square, grad.scatter_add_(1, target, -counted).to(dtype)


def _by_kernel(
    logits: Tensor, target_t: Tensor, z_loss_weight: float, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`_by_operations` in one visit, the gradient in the place of the logits."""
    from moe_train.kernels.head import cross_entropy_

    nll_t, square_t = cross_entropy_(logits, target_t.long(), z_loss_weight, IGNORE, gradient=needs_grad)
    return nll_t.sum(), square_t.sum(), logits if needs_grad else None


def head_loss(
    hidden_td: Tensor, weight_vd: Tensor, target_t: Tensor, z_loss_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sums over tokens, in nats: the objective (with z_loss_weight · log²Z, differentiable) and the plain loss (not).

    hidden_td: (t, d); weight_vd: (v, d), the head; target_t: int64, IGNORE where nothing is to be predicted.
    The z-loss is that of PaLM (arXiv 2204.02311, section 5).
    """
    # Asked here: within the function gradients are always off, and its context calls for them even under no_grad.
    needs_grad = torch.is_grad_enabled() and (hidden_td.requires_grad or weight_vd.requires_grad)
    objective, nll = _HeadLoss.apply(hidden_td, weight_vd, target_t, z_loss_weight, needs_grad)  # type: ignore[no-untyped-call]
    return objective, nll
