"""Run by torchrun: trains a small model for some steps under each case given, and leaves what came out.

    torchrun … spread_worker.py OUT.pt CASES.json

A case: {"name", "overrides", "steps"}, and what it may have: "double" (precision), "crowded" (all tokens to the first
experts), "rounded" (alone, what would travel to experts rounded as on its way), "uncounted" (nothing watches what is
exchanged), "watched" (what happens round shared experts is noted), "wide" (weights are gathered in FP32 whatever reads
them), "left" (clipping's coefficient is left to AdamW), "load" (a folder whose newest checkpoint it goes on from),
"save" (a folder, with a checkpoint after "save_at" steps). OUT.pt: by name, losses and gradient norms of the steps,
expert counts, all weights, whole, and how many rows of each rank 0 holds; what was loaded and saved; what was exchanged
a step, the mean over the processes. Under "collectives", bytes of collective operations with tensors of known size.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_train.compose import compose_run
from moe_train.cost.communication import Exchanged
from moe_train.data.batches import Batches
from moe_train.model.experts import MoELayer
from moe_train.model.transformer import Transformer
from moe_train.parallel import communication
from moe_train.parallel.expert_exchange import _Flight
from moe_train.parallel.narrow_gather import NarrowGather
from moe_train.parallel.packed_rows import packed, rounded_once, unpacked
from moe_train.parallel.sharded import Sharded
from moe_train.parallel.whole_matrices import Copies, WholeMatrices
from moe_train.precision import recipes
from moe_train.training.checkpoints import save_checkpoint
from moe_train.training.optimizers import build_optimizers
from moe_train.training.run_folder import find_checkpoint
from moe_train.training.runtime import Runtime, start_runtime
from moe_train.training.sharded_checkpoints import Saver
from moe_train.training.spreading import Spreading
from moe_train.training.step import Stepper
from moe_train.training.weights import draw_weights, read_weights_here

VOCAB = 64


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Multiplies(torch.optim.AdamW):
    """Takes the coefficient as optimizers with kernels do, on any device."""

    takes_coefficient = True

    def step(self, closure: None = None, *, coefficient: Tensor) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = parameter.grad * coefficient
        super().step(closure)


def train(case: dict[str, Any]) -> dict[str, Any]:
    """One case, on as many processes as there are."""
    config = compose_run(case["overrides"], "case")
    AcceleratorState._reset_state()  # a case may have another precision; the process group stays
    runtime = start_runtime(config)
    model_config = config.model.resolved()
    with torch.device("meta") if runtime.cuts else nullcontext():
        model = Transformer(model_config, VOCAB, config.z_loss_weight, config.activation_checkpointing)
    whole_on_host = not all(parameter.is_meta for parameter in model.parameters())
    if case.get("double"):
        model.double()
    recipes.apply(model, config.precision, runtime.device)
    if case.get("rounded"):
        for module in model.modules():
            if isinstance(module, MoELayer):
                module.exchange = RoundedOnTheSpot()
                rounded_once(module.experts)
    if case.get("uncounted"):
        communication._current = None
    if case.get("wide"):
        with mock.patch.object(NarrowGather, "of_group", return_value=None):
            spread, part = runtime.spread_out(model)
    else:
        spread, part = runtime.spread_out(model)
    if "load" in case:
        checkpoint = find_checkpoint(Path(case["load"]), "load")
        read_weights_here(checkpoint, model, spread)
    else:
        draw_weights(model, spread, config.seed)
    if case.get("crowded"):  # every token goes to the first experts
        for router in model.routers():
            router.selection_bias[: model_config.moe.top_k] = 100.0
    optimizers = build_optimizers(
        model,
        config.optimizer,
        config.seed,
        local=spread.local,
        whole=spread.whole_matrices,
        copies=spread.copies,
        part=part,
    )
    if case.get("left"):
        for optimizer in optimizers:
            optimizer.__class__ = Multiplies
    tokens = np.random.default_rng(0).integers(0, VOCAB, 4001).astype(np.uint16)
    tokens[::3] = tokens[0]  # something to learn
    batches = Batches(tokens, config.data.sequence_length, config.batch_size, config.seed)
    stepper = Stepper(config, runtime, model, spread, optimizers, batches)
    spreading = Spreading(model, spread, optimizers)
    begin, loaded, saved = 0, {}, {}
    if "load" in case:
        spreading.load_optimizers(checkpoint)
        begin, loaded = checkpoint.step, states(spreading)
    begun = weights(model, spread)
    events = in_order(model) if case.get("watched") else []
    losses, norms, counts, first, files, exchanged = [], [], [], {}, [], []
    for step in range(begin, case["steps"]):
        with runtime.exchanges_counted(timed=step % 2 == 0):
            stepper.step(step, *stepper.load(step), 1.0, step / case["steps"])
        exchanged.append(taken(runtime))
        figures = stepper.read_totals()
        losses.append([figures.loss, figures.auxiliary_loss, *figures.mtp_losses])
        norms.append(figures.grad_norm)
        counts.append(figures.counts_le)
        if step == 0:
            first = weights(model, spread)
        if step + 1 == case.get("save_at"):
            saved = states(spreading)
            files = save(Path(case["save"]), spreading, runtime, step + 1)
    mock.patch.stopall()
    held = {name: len(spread.local(name)) for name, _ in model.named_parameters()}
    return {
        "losses": losses,
        "norms": norms,
        "counts": torch.stack(counts) if counts else None,
        "begun": begun,
        "whole_on_host": whole_on_host,
        "files": files,
        "made_whole": made_whole(spread.whole_matrices),
        "done_once": done_once(spread.copies, runtime),
        "loaded": loaded,
        "saved": saved,
        "first": first,
        "weights": weights(model, spread),
        "held": held,
        "exchanged": exchanged,
        "events": events,
        "layout": runtime.layout.name,
    }


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forwards: bool) -> Tensor:
        ctx.forwards = forwards
        return unpacked(packed(x), x.shape[1], x.dtype) if forwards else x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        return grad if ctx.forwards else unpacked(packed(grad), grad.shape[1], grad.dtype), None


class RoundedOnTheSpot:
    """What goes towards experts, in either direction of the pass, in FP8."""

    def sent(self, rows: Tensor, gate: Tensor, ends: Tensor, may_round: bool) -> RoundedOnTheSpot:
        self.rows = _Rounded.apply(rows, True), gate, ends
        return self

    def arrived(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows

    def back(self, out: Tensor) -> Tensor:
        return _Rounded.apply(out, False)


def in_order(model: Transformer) -> list[str]:
    """A list that fills with what happens from now on: exchanges of rows begun and waited for, shared experts done."""
    events: list[str] = []
    begin, wait = _Flight.__init__, _Flight.landed

    def begun(flight: _Flight, x: Tensor, way: Any) -> None:
        begin(flight, x, way)
        flight.what = f"{'dispatch' if way.towards_experts else 'combine'} of {'gates' if x.shape[1] == 1 else 'rows'}"
        events.append(f"{flight.what} begun")

    def landed(flight: _Flight) -> Tensor:
        events.append(f"{flight.what} waited for")
        return wait(flight)

    mock.patch.object(_Flight, "__init__", begun).start()
    mock.patch.object(_Flight, "landed", landed).start()
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.shared_experts.register_forward_hook(lambda *_: events.append("shared experts"))
            module.shared_experts.register_full_backward_hook(lambda *_: events.append("gradients of shared experts"))
    return events


def taken(runtime: Runtime) -> Exchanged | None:
    """What was exchanged since the last call, the mean over the processes."""
    if runtime.communication is None:
        return None
    mine = torch.tensor(runtime.communication.take().numbers(), dtype=torch.float64)
    return Exchanged.of(runtime.summed(mine).tolist(), runtime.world_size)


def collectives(case: dict[str, Any]) -> dict[str, float]:
    """Bytes that rank 0 sends, by operation."""
    AcceleratorState._reset_state()
    runtime = start_runtime(compose_run(case["overrides"], "case"))
    size, rank = runtime.world_size, runtime.rank
    part, whole = torch.ones(10), torch.ones(10 * size)
    splits = [3 * (rank + 1)] * size  # rank r sends 3(r + 1) numbers to each
    calls = {
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "all_reduce": lambda: dist.all_reduce(whole),
        "broadcast": lambda: dist.broadcast(whole, src=0),
        "all_to_all, equal": lambda: dist.all_to_all_single(torch.empty_like(whole), whole),
        "all_to_all, uneven": lambda: dist.all_to_all_single(
            torch.empty(sum(3 * (other + 1) for other in range(size))),
            torch.ones(sum(splits)),
            [3 * (other + 1) for other in range(size)],
            splits,
        ),
        "object": lambda: dist.broadcast_object_list(["x" * 1000], src=0),
        "barrier": dist.barrier,
    }
    found = {}
    for name, call in calls.items():
        assert runtime.communication is not None
        runtime.communication.take()
        with runtime.exchanges_counted(timed=True):
            call()
        found[name] = sum(runtime.communication.take().sent.values())
    call = calls["all_reduce"]
    call()  # no part of a step
    return found | {"outside": runtime.communication.take().sent_outside}


def states(spreading: Spreading) -> dict[str, torch.Tensor]:
    """All that a checkpoint keeps, whole."""
    return {name: whole(tensor).clone() for name, tensor in spreading.tensors().items()}


def save(folder: Path, spreading: Spreading, runtime: Runtime, step: int) -> list[str]:
    if isinstance(spreading.spread, Sharded):
        saver = Saver(folder, spreading, runtime.new_host_group(), keep_last=1)
        saver.save({"step": step})
        local = spreading.spread.local("norm.weight")
        kept = local.data.clone()
        local.data.fill_(7.0)  # what is written is what was, whatever training makes of it meanwhile
        saver.finish(wait=True)
        local.data.copy_(kept)
    elif runtime.is_main:
        save_checkpoint(folder, spreading.model, spreading.optimizers, {"step": step}, keep_last=1)
    runtime.accelerator.wait_for_everyone()
    return sorted(path.name for path in (folder / f"checkpoints/step_{step}").iterdir())


def made_whole(matrices: WholeMatrices | None) -> list[float]:
    """The largest error in doing something to cut matrices, for numbers and heights that do not divide evenly."""
    errors = []
    for count, rows, columns in ((5, 7, 3), (2, 3, 5), (1, 8, 4), (8, 16, 16)) if matrices is not None else ():
        generator = torch.Generator().manual_seed(count)
        whole_ones = torch.randn(count, rows, columns, generator=generator)
        mine = whole_ones.chunk(matrices.parts, dim=1)
        pieces = mine[matrices.part] if matrices.part < len(mine) else whole_ones[:, :0]
        done = matrices.done_whole(lambda x: x @ x.mT @ x, pieces, rows)
        expected = whole_ones @ whole_ones.mT @ whole_ones
        first = matrices.part * -(-rows // matrices.parts)
        assert done.shape == pieces.shape
        errors.append((done - expected[:, first : first + done.shape[1]]).abs().sum().item())
    return errors


def done_once(copies: Copies | None, runtime: Runtime) -> list[tuple[float, list[int]]]:
    """For numbers of matrices: the largest error in doing something to copies, and how many each process did."""
    found = []
    for count in (1, 3, 4, 9) if copies is not None and copies.groups else ():
        matrices, done = torch.randn(count, 3, 5, generator=torch.Generator().manual_seed(count)), torch.zeros(1)

        def function(some: Tensor) -> Tensor:
            done.add_(len(some))  # noqa: B023
            return some @ some.mT @ some

        out = copies.done_once(function, matrices, dist.group.WORLD)
        error = (out - matrices @ matrices.mT @ matrices).abs().max().item()
        everyone = [torch.zeros(1) for _ in range(runtime.world_size)]
        dist.all_gather(everyone, done)
        found.append((error, [int(each) for each in everyone]))
    return found


def weights(model: Transformer, spread: Any) -> dict[str, torch.Tensor]:
    found = {
        name: whole(spread.as_saved(name, spread.local(name).data)).clone() for name, _ in model.named_parameters()
    }
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def main(out: Path, cases: list[dict[str, Any]]) -> None:
    results = {case["name"]: collectives(case) if "collectives" in case else train(case) for case in cases}
    if PartialState().process_index == 0:
        torch.save(results, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
