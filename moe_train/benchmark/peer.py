"""suite=peer: our step against transformers' own, with the same weights, batches and optimizer."""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_train.benchmark import tax
from moe_train.benchmark.arms import TrainingArm, rates
from moe_train.benchmark.bench import Bench, described
from moe_train.benchmark.figures import Figure, estimate, measured, not_measured, paired
from moe_train.benchmark.peer_arm import PeerArm
from moe_train.benchmark.step_memory import peak_bytes
from moe_train.benchmark.timing import interleaved
from moe_train.model.transformer import Transformer

# In FP32, before anything is timed: orders of summation differ, nothing else may.
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-3  # of the norm over all parameters


def run(bench: Bench, *usually: str) -> list[Figure]:
    """With AdamW on both sides, and selection biases at rest on both: transformers never moves them."""
    config = bench.config(*(usually or tax.usual(bench)), "optimizer=adamw", without=["optimizer"])
    ours = TrainingArm(config, bench.runtime)
    ours.rest_biases()
    with tempfile.TemporaryDirectory() as folder:
        theirs = PeerArm(ours, Path(folder))
    of, suite = f"{described(config, bench.runtime)}; {theirs.architecture}", bench.suite
    apart = relative_difference(ours, theirs)
    same = f"loss within {apart[0]:.0e}, gradient norm within {apart[1]:.0e} in FP32"
    if apart[0] > LOSS_TOLERANCE or apart[1] > GRADIENT_TOLERANCE:
        reason = f"the arms do not compute the same: {same}"
        return [not_measured(suite, name, "ratio", reason, of) for name in ("peer_speedup", "peak_memory_ratio")]
    arms = {"ours": ours.step, "theirs": theirs.step}
    compiling = _try_to_compile(bench, theirs)
    if not isinstance(compiling, str):
        arms["compiled"] = theirs.compiled_step
    seconds = interleaved(
        arms, bench.runtime.device, rounds=bench.effort.rounds, budget_seconds=2 * bench.effort.budget_seconds
    )
    fastest = min((name for name in arms if name != "ours"), key=lambda name: estimate(seconds[name]).value)
    note = f"{same}; against {'torch.compile' if fastest == 'compiled' else 'eager'}"
    speed, device = "tokens/s", bench.runtime.device
    figures = [
        measured(suite, "peer_speedup", paired(seconds[fastest], seconds["ours"]), "ratio", of, note),
        measured(suite, "our_tokens_per_second", estimate(rates(ours.tokens, seconds["ours"])), speed, of),
        measured(suite, "peer_tokens_per_second", estimate(rates(ours.tokens, seconds["theirs"])), speed, of),
    ]
    name = "peer_tokens_per_second_compiled"
    if isinstance(compiling, str):
        figures.append(not_measured(suite, name, speed, compiling, of))
    else:
        rate = estimate(rates(ours.tokens, seconds["compiled"]))
        figures.append(measured(suite, name, rate, speed, of, f"compiled in {compiling:,.0f} s"))
    mine = peak_bytes(ours.launched_step, ours.state(), device)
    yours = peak_bytes(theirs.step, theirs.state(), device)
    memory = f"{mine / 1e6:,.0f} MB against {yours / 1e6:,.0f} MB (eager) at the peak of a step"
    figures.append(Figure(suite, "peak_memory_ratio", mine / yours, "ratio", of, note=memory))
    return figures


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
    began = time.perf_counter()
    try:
        theirs.compiled_step()
    except Exception as error:  # whatever dynamo, inductor or a missing compiler raise
        torch._dynamo.reset()
        theirs.model.zero_grad(set_to_none=True)
        return f"torch.compile fails here: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return time.perf_counter() - began
