"""Expert parallelism: rows travel to the process that has their expert, and their results back.

    rows by expert ─ all-to-all ─► rows by (process, expert) ─ by expert ─► products ─ back ─► all-to-all ─► results

Every process sends each other one as many rows as its tokens chose experts there, none perhaps (GShard, arXiv
2006.16668; DeepSeek-V3, arXiv 2412.19437, section 3.2.2). How many is exchanged first and read by the host, since an
all-to-all has to know: one wait for the device a layer and pass. Backwards gradients travel the same ways. What goes
towards experts, tokens and the gradients of their outputs, can go in FP8; what comes back keeps its format (section
3.3.3).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.model import dispatch
from moe_train.model.experts import Experts, Products
from moe_train.model.transformer import Transformer
from moe_train.parallel.communication import labelled
from moe_train.parallel.packed_rows import packed, rounded_once, unpacked


class ExpertExchange:
    """Between the processes of `group`, of which the r-th has the r-th part of the experts.

    `fp8`: what goes towards experts is rounded to FP8 where a pass may be.
    """

    def __init__(self, group: dist.ProcessGroup, fp8: bool) -> None:
        self.group, self.fp8 = group, fp8
        self.parts = dist.get_world_size(group)

    def __call__(self, rows_nd: Tensor, gate_n1: Tensor, ends_e: Tensor, products: Products, may_round: bool) -> Tensor:
        """Rows sorted by expert, their gates, and where each of all experts' rows end → their outputs (n, d).

        `products` takes the same of the rows of this process's experts.
        """
        fp8 = self.fp8 and may_round
        sent_e = torch.diff(ends_e.long(), prepend=ends_e.new_zeros(1, dtype=torch.int64))
        received_pe = torch.empty_like(sent_e)  # by process, then by expert of this one
        dist.all_to_all_single(received_pe, sent_e, group=self.group)
        per_process = torch.stack([sent_e.view(self.parts, -1).sum(1), received_pe.view(self.parts, -1).sum(1)])
        sent, received = per_process.tolist()
        order_m, inverse_m, ends_l = _by_expert(received_pe.view(self.parts, -1), sum(received))

        there, back = _Way(sent, received, self.group, True, fp8), _Way(received, sent, self.group, False, fp8)
        rows_md = dispatch.permuted(_travelled(rows_nd, there), order_m, inverse_m)
        gate_m1 = dispatch.permuted(_travelled(gate_n1, there._replace(fp8=False)), order_m, inverse_m)
        out_md = products(rows_md, gate_m1, ends_l)
        return _travelled(dispatch.permuted(out_md, inverse_m, order_m), back)


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


class _Way(NamedTuple):
    """`sent[p]` rows go to process p of the group, `received[p]` come from it."""

    sent: list[int]
    received: list[int]
    group: dist.ProcessGroup
    towards_experts: bool
    fp8: bool  # towards experts

    @property
    def back(self) -> _Way:
        return self._replace(sent=self.received, received=self.sent, towards_experts=not self.towards_experts)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        return _exchanged(x, way)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _exchanged(grad_outputs[0], ctx.way.back), None


def _travelled(x: Tensor, way: _Way) -> Tensor:
    """The rows that others sent here, by process; gradients go back."""
    out: Tensor = _AllToAll.apply(x, way)  # type: ignore[no-untyped-call]
    return out


def _exchanged(x_nd: Tensor, way: _Way) -> Tensor:
    in_fp8 = way.fp8 and way.towards_experts
    leaving = packed(x_nd) if in_fp8 else x_nd.contiguous()
    arriving = leaving.new_empty(sum(way.received), leaving.shape[1])
    with labelled("dispatch" if way.towards_experts else "combine"):
        dist.all_to_all_single(arriving, leaving, way.received, way.sent, group=way.group)
    return unpacked(arriving, x_nd.shape[1], x_nd.dtype) if in_fp8 else arriving


def share_out_experts(model: Transformer, group: dist.ProcessGroup, fp8: bool) -> None:
    """Leave this process its part of every layer's experts, and let tokens reach the others, in FP8 or as they are."""
    part, parts = dist.get_rank(group), dist.get_world_size(group)
    exchange = ExpertExchange(group, fp8)
    for module in model.modules():
        if isinstance(module, Experts):
            for name, weight in list(module.named_parameters()):
                mine = weight.detach().chunk(parts)[part].clone()
                setattr(module, name, nn.Parameter(mine))
            module.exchange = exchange
            if fp8:
                rounded_once(module)
