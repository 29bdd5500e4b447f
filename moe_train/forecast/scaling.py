"""The same run on few and on many devices: the fastest layout that fits each number of them, and what limits it there.

All pipelines, expert layouts, shardings and schedules of powers of two are put together from parts; weights, gradients
and optimizer states may take half of a device's memory, the other half being left to activations (an assumption).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from moe_train.config import HardwareConfig
from moe_train.errors import UserError
from moe_train.forecast.parts import Machine, Step, Task, micro_batches, step
from moe_train.forecast.training_run import GB
from moe_train.forecast.work import ATTENTION, BF16, FP8, FP32

DEVICES = (8, 64, 512, 4096)
STATES_SHARE = 0.5
MEMORY_LIMIT = "device memory"
_WANTED = (FP8, BF16, FP32, ATTENTION)  # what the model asks for; everything else is the price of running it
_SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Limit:
    """`step` and `machine` are None where nothing fits; `needs_bytes` is then the least a device would have to hold."""

    num_devices: int
    machine: Machine | None
    step: Step | None
    limit: str
    share: float | None  # of the GPU-hours that go to the limit
    needs_bytes: float


def limits(task: Task, hardware: HardwareConfig) -> list[Limit]:
    """One for each of DEVICES. Raises UserError where the hardware lacks a figure."""
    if hardware.memory_gb is None:
        raise UserError(f"the memory of hardware={hardware.name} is not known: choose another or give it in its file")
    return [_limit(task, hardware, number, hardware.memory_gb * GB * STATES_SHARE) for number in DEVICES]


def _limit(task: Task, hardware: HardwareConfig, number: int, room: float) -> Limit:
    found = [(machine, step(task, machine)) for machine in _layouts(task, hardware, number)]
    if not found:
        return Limit(number, None, None, f"batch_size={task.batch_size} does not divide", None, 0.0)
    fitting = [each for each in found if each[1].state_bytes <= room]
    if not fitting:
        return Limit(number, None, None, MEMORY_LIMIT, None, min(each.state_bytes for _, each in found))
    machine, best = min(fitting, key=lambda each: each[1].seconds)
    name = max((part for part in best.exposed if part not in _WANTED), key=lambda part: best.exposed[part])
    return Limit(number, machine, best, name, best.exposed[name] / best.seconds, best.state_bytes)


def _layouts(task: Task, hardware: HardwareConfig, number: int) -> Iterator[Machine]:
    """Those that divide."""
    plain = Machine(hardware, number, 1, 1, "1f1b", "ddp")
    for stages in _SIZES:
        for experts in _SIZES:
            for schedule in ("1f1b", "zb1p", "dualpipe") if stages > 1 else ("1f1b",):
                for sharding in ("ddp", "zero1", "fsdp2"):
                    machine = dataclasses.replace(
                        plain,
                        pipeline_parallel=stages,
                        expert_parallel=experts,
                        schedule=schedule,
                        sharding=sharding,
                    )
                    if _divides(task, machine):
                        yield machine


def _divides(task: Task, machine: Machine) -> bool:
    try:
        micro_batches(task, machine)
    except UserError:
        return False
    return True
