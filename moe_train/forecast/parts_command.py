"""`scripts/forecast.py parts=true`: where the hours of a run on many devices go, and what limits it at other sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from moe_train.compose import compose_model
from moe_train.cost.flops import parameter_counts
from moe_train.errors import UsageError
from moe_train.forecast.commands import named_hardware, precision_of
from moe_train.forecast.parts import Machine, Sharding, Step, Task, step
from moe_train.forecast.parts_tables import show_parts
from moe_train.forecast.pipeline import Schedule
from moe_train.forecast.published import published_runs
from moe_train.forecast.rates import SOURCES, AttentionKernel
from moe_train.forecast.scaling import STATES_SHARE, Limit, limits
from moe_train.forecast.training_run import GB

A_TRILLION = 10**12
LEFT_OUT = (
    "left out: uneven load of experts, devices slowed by their power limit, activations in what fits, evaluation, "
    "checkpoints, failures and restarts"
)


class _Asked(Protocol):
    tokens: int | None
    hardware: str | None
    num_gpus: int
    precision: str | None
    expert_parallel: int | None
    pipeline_parallel: int
    pipeline_schedule: Schedule
    sharding: Sharding
    attention_kernel: AttentionKernel | None
    batch_size: int | None
    micro_batch: int
    sequence_length: int | None
    vocab_size: int | None
    price_usd_per_hour: float | None
    plot: Path | None


def put_together(asked: _Asked, overrides: list[str], config_dir: Path | None) -> dict[str, Any]:
    """Figures of the run as asked for, and of its fastest layouts on other numbers of devices. Raises UserError."""
    if asked.batch_size is None:
        raise UsageError("batch_size= is missing: give the sequences of a step, e.g. batch_size=1024")
    if asked.pipeline_parallel == 1 and asked.pipeline_schedule != "1f1b":
        raise UsageError(
            f"pipeline_schedule={asked.pipeline_schedule} does nothing in one stage: give pipeline_parallel=N as well"
        )
    hardware = named_hardware(asked.hardware, asked.price_usd_per_hour, config_dir)
    composed = compose_model(overrides, config_dir)
    task = Task(
        model=composed.model.resolved(),
        vocab_size=asked.vocab_size or composed.model.vocab_size or composed.default_vocab_size,
        sequence_length=asked.sequence_length or composed.sequence_length,
        batch_size=asked.batch_size,
        micro_batch=asked.micro_batch,
        fp8=precision_of(asked.precision) == "fp8",
        attention_kernel=asked.attention_kernel,
    )
    machine = Machine(
        hardware,
        asked.num_gpus,
        asked.pipeline_parallel,
        asked.expert_parallel or 1,
        asked.pipeline_schedule,
        asked.sharding,
    )
    tokens = asked.tokens or A_TRILLION
    taken = step(task, machine)
    hours = _hours(taken, machine.num_devices, tokens)
    price = hardware.price_usd_per_hour
    content: dict[str, Any] = {
        "model": task.model.name,
        "hardware": hardware.name,
        "num_devices": machine.num_devices,
        "precision": "fp8" if task.fp8 else "bf16",
        "attention_kernel": task.kernel,
        "layout": _layout(machine),
        "tokens": tokens,
        "micro_batches": taken.micro_batches,
        "step_seconds": taken.seconds,
        "tokens_per_second_per_gpu": taken.tokens / taken.seconds / machine.num_devices,
        "gpu_hours": hours,
        "usd": None if price is None else hours * price,
        "published_gpu_hours": _published_hours(task, hardware.name, tokens),
        "gpu_hours_by_part": {name: hours * s / taken.seconds for name, s in taken.exposed.items()},
        "hidden_gpu_hours": {name: hours * s / taken.seconds for name, s in taken.hidden.items()},
        "state_bytes": taken.state_bytes,
        "memory_bytes": None if hardware.memory_gb is None else hardware.memory_gb * GB,
        "states_share": STATES_SHARE,
        "limits": [_described(each, tokens) for each in limits(task, hardware)],
        "sources": list(SOURCES),
        "notes": [f"attention at the rates of {task.kernel} (attention_kernel=)", LEFT_OUT],
    }
    show_parts(content)
    if asked.plot:
        from moe_train.forecast.parts_plot import plot_parts

        plot_parts(content, asked.plot)
    return content


def _published_hours(task: Task, hardware: str, tokens: int) -> float | None:
    """What a published run of that size on that device took for so many tokens, on however many of them."""
    counts = parameter_counts(task.model, task.vocab_size)
    sizes = (counts.total - counts.mtp, counts.active)
    for run in published_runs():
        pairs = zip(sizes, (run.total_params, run.active_params), strict=True)
        if run.hardware == hardware and all(abs(own / theirs - 1) < 0.03 for own, theirs in pairs):
            return run.gpu_hours / run.tokens * tokens
    return None


def _hours(taken: Step, devices: int, tokens: int) -> float:
    return taken.seconds * devices / 3600 * tokens / taken.tokens


def _layout(machine: Machine) -> dict[str, Any]:
    return {
        "pipeline_parallel": machine.pipeline_parallel,
        "expert_parallel": machine.expert_parallel,
        "schedule": machine.schedule if machine.pipeline_parallel > 1 else None,
        "sharding": machine.sharding,
    }


def _described(each: Limit, tokens: int) -> dict[str, Any]:
    fits = each.machine is not None and each.step is not None
    return {
        "num_devices": each.num_devices,
        "layout": _layout(each.machine) if each.machine is not None else None,
        "gpu_hours": _hours(each.step, each.num_devices, tokens) if each.step is not None else None,
        "limit": each.limit,
        "share": each.share,
        "state_bytes": each.needs_bytes,
        "fits": fits,
    }
