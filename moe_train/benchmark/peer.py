"""suite=peer: our step against transformers' own, with the same weights, batches and optimizer."""

from __future__ import annotations

import copy
import gc
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_train.benchmark import tax
from moe_train.benchmark.arms import TrainingArm, rates
from moe_train.benchmark.bench import Bench, described
from moe_train.benchmark.figures import Estimate, Figure, estimate, measured, not_measured, paired
from moe_train.benchmark.peer_arm import PeerArm
from moe_train.benchmark.step_memory import peak_bytes
from moe_train.benchmark.timing import interleaved
from moe_train.model.transformer import Transformer

# In FP32, before anything is timed: orders of summation differ, nothing else may.
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-3  # of the norm over all parameters


def run(bench: Bench, *usually: str) -> list[Figure]:
    """With AdamW on both sides, and selection biases at rest on both: transformers never moves them.

    Theirs twice, one after the other, as both would not fit beside ours: with weights in FP32 and, where products are
    in BF16, in that. The ratio is to the fastest of theirs, compiled or not.
    """
    config = bench.config(*(usually or tax.usual(bench)), "optimizer=adamw", without=["optimizer"])
    ours = TrainingArm(config, bench.runtime)
    ours.rest_biases()
    theirs = _peer(ours, torch.float32)
    of, suite = f"{described(config, bench.runtime)}; {theirs.architecture}", bench.suite
    apart = relative_difference(ours, theirs)
    same = f"loss within {apart[0]:.0e}, gradient norm within {apart[1]:.0e} in FP32"
    if apart[0] > LOSS_TOLERANCE or apart[1] > GRADIENT_TOLERANCE:
        reason = f"the arms do not compute the same: {same}"
        return [not_measured(suite, name, "ratio", reason, of) for name in ("peer_speedup", "peak_memory_ratio")]
    compared = [_compare(bench, ours, theirs, "")]
    del theirs
    if bench.runtime.dtype is torch.bfloat16:
        gc.collect()
        compared.append(_compare(bench, ours, _peer(ours, torch.bfloat16), "_bf16_weights"))
    fastest = min(compared, key=lambda each: each.seconds)
    device, speed = bench.runtime.device, "tokens/s"
    figures = [
        measured(suite, "peer_speedup", fastest.speedup, "ratio", of, f"{same}; against {fastest.name}"),
        measured(suite, "our_tokens_per_second", estimate(rates(ours.tokens, fastest.ours)), speed, of),
    ]
    mine = peak_bytes(ours.launched_step, ours.state(), device)
    for each in compared:
        for name, found in each.rates.items():
            if isinstance(found, str):
                figures.append(not_measured(suite, name, speed, found, of))
            else:
                figures.append(measured(suite, name, found.estimate, speed, of, found.note))
        memory = f"{mine / 1e6:,.0f} MB against {each.peak / 1e6:,.0f} MB (eager) at the peak of a step"
        figures.append(Figure(suite, each.memory_name, mine / each.peak, "ratio", of, note=memory))
    return figures


class _Rate(NamedTuple):
    estimate: Estimate
    note: str | None


class _Compared(NamedTuple):
    """Theirs in one format of the weights."""

    name: str  # of its faster form
    seconds: float  # of a step of that
    speedup: Estimate
    ours: list[float]  # seconds of our steps beside it
    rates: dict[str, _Rate | str]  # by figure, or why there is none
    memory_name: str
    peak: int  # bytes


def _peer(ours: TrainingArm, weights: torch.dtype) -> PeerArm:
    with tempfile.TemporaryDirectory() as folder:
        return PeerArm(ours, Path(folder), weights)


def _compare(bench: Bench, ours: TrainingArm, theirs: PeerArm, suffix: str) -> _Compared:
    arms = {"ours": ours.step, "eager": theirs.step}
    compiling = _try_to_compile(bench, theirs)
    if not isinstance(compiling, str):
        arms["torch.compile"] = theirs.compiled_step
    seconds = interleaved(
        arms, bench.runtime.device, rounds=bench.effort.rounds, budget_seconds=2 * bench.effort.budget_seconds
    )
    fastest = min((name for name in arms if name != "ours"), key=lambda name: estimate(seconds[name]).value)
    rate = f"peer_tokens_per_second{suffix}"
    found: dict[str, _Rate | str] = {rate: _Rate(estimate(rates(ours.tokens, seconds["eager"])), None)}
    if isinstance(compiling, str):
        found[f"{rate}_compiled"] = compiling
    else:
        torch._dynamo.reset()  # or it would keep the model, and the next would find no memory
        compiled = estimate(rates(ours.tokens, seconds["torch.compile"]))
        found[f"{rate}_compiled"] = _Rate(compiled, f"compiled in {compiling:,.0f} s")
    return _Compared(
        name=fastest + (" with weights in BF16" if suffix else ""),
        seconds=estimate(seconds[fastest]).value,
        speedup=paired(seconds[fastest], seconds["ours"]),
        ours=seconds["ours"],
        rates=found,
        memory_name=f"peak_memory_ratio{suffix}",
        peak=peak_bytes(theirs.step, theirs.state(), bench.runtime.device),
    )


def relative_difference(ours: TrainingArm, theirs: PeerArm) -> tuple[float, float]:
    """Of the loss and of the gradient's norm of one sequence, of copies of both models on the CPU, in FP32."""
    inputs, targets = (tensor[:1].cpu() for tensor in ours.batches[0])
    # Not in training mode: transformers has none of the routers' losses.
    own = Transformer(ours.model_config, ours.vocab_size).eval()
    own.load_state_dict({name: tensor.cpu() for name, tensor in ours.model.state_dict().items()})
    loss = own(inputs, targets).objective / ours.tokens
    other = copy.deepcopy(theirs.model).cpu().eval()
    their_loss = theirs.loss(other, inputs, targets)
    return _difference(loss, their_loss), _difference(_gradient_norm(own, loss), _gradient_norm(other, their_loss))


def _gradient_norm(model: nn.Module, loss: Tensor) -> Tensor:
    return nn.utils.get_total_norm(torch.autograd.grad(loss, list(model.parameters())))


def _difference(mine: Tensor, other: Tensor) -> float:
    return abs(float((mine / other).detach()) - 1)


def _try_to_compile(bench: Bench, theirs: PeerArm) -> str | float:
    """The seconds that it took, or why there is no compiled arm."""
    if bench.compiles_peer is False:
        return "not tried, as it takes minutes on a CPU: suite=peer compile=true tries it"
    if bench.on_gpu and theirs.autocasts:
        # Every layer ends in "inductor failed with _local_scalar_dense": minutes on an H200, and what is left is eager.
        return (
            "not tried: with weights in FP32 their experts' product reads from the host, where torch.compile breaks off"
        )
    began = time.perf_counter()
    try:
        theirs.compiled_step()
    except Exception as error:  # whatever dynamo, inductor or a missing compiler raise
        torch._dynamo.reset()
        theirs.model.zero_grad(set_to_none=True)
        return f"torch.compile fails here: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return time.perf_counter() - began
