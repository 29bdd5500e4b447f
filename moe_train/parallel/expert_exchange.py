"""Expert parallelism: rows travel to the process that has their expert, and their results back.

    rows by expert ─ all-to-all ─► rows by (process, expert) ─ by expert ─► products ─ back ─► all-to-all ─► results

Every process sends each other one as many rows as its tokens chose experts there, none perhaps (GShard, arXiv
2006.16668; DeepSeek-V3, arXiv 2412.19437, section 3.2.2). How many is exchanged first and read by the host, since an
all-to-all has to know: one wait for the device a layer and pass. Backwards gradients travel the same ways.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.model import dispatch
from moe_train.model.experts import Experts, Products
from moe_train.model.transformer import Transformer


class ExpertExchange:
    """Between the processes of `group`, of which the r-th has the r-th part of the experts."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.parts = dist.get_world_size(group)

    def __call__(self, rows_nd: Tensor, gate_n1: Tensor, ends_e: Tensor, products: Products) -> Tensor:
        """Rows sorted by expert, their gates, and where each of all experts' rows end → their outputs (n, d).

        `products` takes the same of the rows of this process's experts.
        """
        sent_e = torch.diff(ends_e.long(), prepend=ends_e.new_zeros(1, dtype=torch.int64))
        received_pe = torch.empty_like(sent_e)  # by process, then by expert of this one
        dist.all_to_all_single(received_pe, sent_e, group=self.group)
        per_process = torch.stack([sent_e.view(self.parts, -1).sum(1), received_pe.view(self.parts, -1).sum(1)])
        sent, received = per_process.tolist()
        order_m, inverse_m, ends_l = _by_expert(received_pe.view(self.parts, -1), sum(received))

        rows_md = dispatch.permuted(_travelled(rows_nd, sent, received, self.group), order_m, inverse_m)
        gate_m1 = dispatch.permuted(_travelled(gate_n1, sent, received, self.group), order_m, inverse_m)
        out_md = products(rows_md, gate_m1, ends_l)
        return _travelled(dispatch.permuted(out_md, inverse_m, order_m), received, sent, self.group)


def _by_expert(received_pl: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """What brings rows that lie by process, then expert, into the order of experts; its inverse; where experts end.

    Within an expert rows stay in the order of processes, that of tokens in the batch.
    """
    parts, local = received_pl.shape
    experts = torch.arange(local, device=received_pl.device).repeat(parts)
    expert_m = experts.repeat_interleave(received_pl.flatten(), output_size=total)
    order_m = expert_m.argsort(stable=True)
    inverse_m = torch.empty_like(order_m)
    inverse_m[order_m] = torch.arange(total, device=order_m.device)
    return order_m, inverse_m, received_pl.sum(0).cumsum(0).to(torch.int32)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grad_outputs[0].contiguous()
        out = grad.new_empty(sum(ctx.sent), *grad.shape[1:])
        dist.all_to_all_single(out, grad, ctx.sent, ctx.received, group=ctx.group)
        return out, None, None, None


def _travelled(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows that others sent here, by process: `sent[p]` of x's go to process p of the group."""
    out: Tensor = _AllToAll.apply(x, sent, received, group)  # type: ignore[no-untyped-call]
    return out


def share_out_experts(model: Transformer, group: dist.ProcessGroup) -> None:
    """Leave this process its part of every layer's experts, and let tokens reach the others."""
    part, parts = dist.get_rank(group), dist.get_world_size(group)
    exchange = ExpertExchange(group)
    for module in model.modules():
        if isinstance(module, Experts):
            for name, weight in list(module.named_parameters()):
                mine = weight.detach().chunk(parts)[part].clone()
                setattr(module, name, nn.Parameter(mine))
            module.exchange = exchange
