"""Expert parallelism: rows travel to the process that has their expert, and their results back.

    rows by expert ─ all-to-all ─► rows by (process, expert) ─ by expert ─► products ─ back ─► all-to-all ─► results

Every process sends each other one as many rows as its tokens chose experts there, none perhaps (GShard, arXiv
2006.16668; DeepSeek-V3, arXiv 2412.19437, section 3.2.2). How many is exchanged first and read by the host, since an
all-to-all has to know: one wait for the device a layer and pass. Backwards gradients travel the same ways. Rows leave
before the shared experts are computed and are waited for after, and so do the gradients of tokens. What goes towards
experts, tokens and the gradients of their outputs, can go in FP8; what comes back keeps its format (section 3.3.3).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.model import dispatch
from moe_train.model.experts import MoELayer
from moe_train.model.transformer import Transformer
from moe_train.parallel.communication import labelled, wait_for
from moe_train.parallel.packed_rows import packed, rounded_once, unpacked


class ExpertExchange:
    """Between the processes of `group`, of which the r-th has the r-th part of the experts.

    `fp8`: what goes towards experts is rounded to FP8 where a pass may be.
    """

    def __init__(self, group: dist.ProcessGroup, fp8: bool) -> None:
        self.group, self.fp8 = group, fp8
        self.parts = dist.get_world_size(group)

    def sent(self, rows_nd: Tensor, gate_n1: Tensor, ends_e: Tensor, may_round: bool) -> _Sent:
        """Rows sorted by expert, their gates, and where each of all experts' rows end: they leave."""
        sent_e = torch.diff(ends_e.long(), prepend=ends_e.new_zeros(1, dtype=torch.int64))
        received_pe = torch.empty_like(sent_e)  # by process, then by expert of this one
        dist.all_to_all_single(received_pe, sent_e, group=self.group)
        received_pl = received_pe.view(self.parts, -1)
        sent, received = torch.stack([sent_e.view(self.parts, -1).sum(1), received_pl.sum(1)]).tolist()
        way = _Way(sent, received, self.group, True, self.fp8 and may_round)
        return _Sent(_Journey(rows_nd, way), _Journey(gate_n1, way._replace(fp8=False)), way, received_pl)


class _Sent:
    def __init__(self, rows: _Journey, gates: _Journey, way: _Way, received_pl: Tensor) -> None:
        self._rows, self._gates, self._way, self._received_pl = rows, gates, way, received_pl

    def arrived(self) -> tuple[Tensor, Tensor, Tensor]:
        self._order_m, self._inverse_m, ends_l = _by_expert(self._received_pl, sum(self._way.received))
        rows_md, gate_m1 = (
            dispatch.permuted(each.end(), self._order_m, self._inverse_m) for each in (self._rows, self._gates)
        )
        return rows_md, gate_m1, ends_l

    def back(self, out_md: Tensor) -> Tensor:
        return _Journey(dispatch.permuted(out_md, self._inverse_m, self._order_m), self._way.back).end()


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


class _Journey:
    """Rows that go `way`, from now on; gradients come back while whatever was computed in between is gone through."""

    def __init__(self, x_nd: Tensor, way: _Way) -> None:
        self.way = way
        self._flights: list[_Flight] = []  # forwards; later backwards
        self._left: Tensor | None = _Leave.apply(x_nd, self)  # type: ignore[no-untyped-call]

    def end(self) -> Tensor:
        """Wait for the rows that others sent here, by process."""
        left, self._left = self._left, None  # the graph has this object, which must not keep the graph
        out: Tensor = _Arrive.apply(left, self)  # type: ignore[no-untyped-call]
        return out

    def leave(self, x_nd: Tensor, way: _Way) -> Tensor:
        """What stands for the rows in the graph until they are there: one number."""
        self._flights.append(_Flight(x_nd, way))
        return x_nd.new_zeros(())

    def arrive(self) -> Tensor:
        return self._flights.pop().landed()


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        return journey.leave(x_nd, journey.way)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.arrive(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        return journey.arrive()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.leave(grad_outputs[0], ctx.journey.way.back), None


class _Flight:
    """One all-to-all under way."""

    def __init__(self, x_nd: Tensor, way: _Way) -> None:
        self._in_fp8 = way.fp8 and way.towards_experts
        self._width, self._dtype = x_nd.shape[1], x_nd.dtype
        self._leaving = packed(x_nd) if self._in_fp8 else x_nd.contiguous()  # kept until it has left
        self._arriving = self._leaving.new_empty(sum(way.received), self._leaving.shape[1])
        with labelled("dispatch" if way.towards_experts else "combine", waited_for=True):
            self._work = dist.all_to_all_single(
                self._arriving, self._leaving, way.received, way.sent, group=way.group, async_op=True
            )

    def landed(self) -> Tensor:
        wait_for(self._work)
        return unpacked(self._arriving, self._width, self._dtype) if self._in_fp8 else self._arriving


def share_out_experts(model: Transformer, group: dist.ProcessGroup, fp8: bool) -> None:
    """Leave this process its part of every layer's experts, and let tokens reach the others, in FP8 or as they are."""
    part, parts = dist.get_rank(group), dist.get_world_size(group)
    exchange = ExpertExchange(group, fp8)
    for module in model.modules():
        if isinstance(module, MoELayer):
            for name, weight in list(module.experts.named_parameters()):
                mine = weight.detach().chunk(parts)[part].clone()
                setattr(module.experts, name, nn.Parameter(mine))
            module.exchange = exchange
            if fp8:
                rounded_once(module.experts)
