"""suite=step: a whole training step against the rate at which the device multiplies, and what it spends otherwise."""

from __future__ import annotations

import tempfile
from pathlib import Path

from moe_train.benchmark.arms import TrainingArm, rates
from moe_train.benchmark.bench import Bench, described
from moe_train.benchmark.ceilings import square_matmul_tflops
from moe_train.benchmark.figures import Figure, estimate, measured, not_measured, paired
from moe_train.benchmark.host_reads import HostReads, waits_of_cuda
from moe_train.benchmark.overhead import run_shares
from moe_train.benchmark.step_memory import peak_bytes
from moe_train.benchmark.timing import interleaved
from moe_train.config import RunConfig
from moe_train.errors import UserError


def usual(bench: Bench) -> tuple[str, ...]:
    """`base` on a GPU, `tiny` on a CPU."""
    return ("model=base", "data.sequence_length=1024", "batch_size=64") if bench.on_gpu else ("model=tiny",)


def run(bench: Bench, *usually: str, with_a_run: bool = True) -> list[Figure]:
    """`with_a_run`: launch the real command as well, for the overhead of its loop."""
    settings = usually or usual(bench)
    config = bench.config(*settings)
    figures = _timed(bench, config)
    if with_a_run and bench.launches:
        bench.let_go()
        figures += _overhead(bench, settings, described(config, bench.runtime))
    return figures


def _timed(bench: Bench, config: RunConfig) -> list[Figure]:
    device, dtype, suite = bench.runtime.device, bench.runtime.dtype, bench.suite
    arm = TrainingArm(config, bench.runtime)
    peaks: list[float] = []

    def multiply() -> None:
        peaks.append(square_matmul_tflops(device, dtype))

    arms = {"step": arm.step, "forward_backward": arm.forward_backward, "multiply": multiply}
    seconds = interleaved(arms, device, rounds=bench.effort.rounds, budget_seconds=bench.effort.budget_seconds)
    of = described(config, bench.runtime)
    steps, passes = seconds["step"], seconds["forward_backward"]
    rate = [arm.flops_per_step / each / 1e12 for each in steps]
    utilization = paired(rate, peaks[2:])
    clock = f"{arm.flops_per_step / arm.tokens / 1e6:,.1f} MFLOPs a token against the fastest square product"
    return [
        measured(suite, "tokens_per_second", estimate(rates(arm.tokens, steps)), "tokens/s", of),
        measured(suite, "utilization_of_measured_peak", utilization, "share", of, clock),
        measured(suite, "optimizer_fraction", paired([s - p for s, p in zip(steps, passes)], steps), "share", of,
                 "of a step, beside forward and backward"),
        _host_reads(bench, arm, of),
        Figure(suite, "peak_memory_bytes", peak_bytes(arm.launched_step, arm.state(), device), "bytes", of,
               note="tensors alive, weights and optimizer states included"),
    ]  # fmt: skip


def _host_reads(bench: Bench, arm: TrainingArm, of: str) -> Figure:
    """Of one step; what a step of a GPU should have is none."""
    with HostReads() as reads:
        arm.launched_step()
    count = sum(reads.everywhere.values())
    places = ", ".join(f"{place} {times}×" for place, times in sorted(reads.everywhere.items()))
    apart = sum(reads.on_cpu_only.values())
    notes = [places, f"{apart} more in code for CPUs alone" if apart else ""]
    if bench.on_gpu:
        waits = waits_of_cuda(arm.launched_step)
        notes.append(f"{waits} counted by torch.cuda")
        count = max(count, waits)
    note = "; ".join(text for text in notes if text)
    return Figure(bench.suite, "host_synchronizations", float(count), "count", of, note=note or None)


def _overhead(bench: Bench, settings: tuple[str, ...], of: str) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            shares, waits = run_shares(bench.overrides(*settings), Path(folder), bench.runtime.device_name)
        except UserError as error:
            return [not_measured(bench.suite, name, "share", str(error), of) for name in _OF_A_RUN]
    return [measured(bench.suite, name, estimate(found), "share", of, note)
            for (name, note), found in zip(_OF_A_RUN.items(), (shares, waits))]  # fmt: skip


_OF_A_RUN = {
    "overhead_fraction": "tracker, meter and data, of a run of the real command with its log every 10 steps",
    "data_wait_fraction": "of the same run's training seconds",
}
