"""How long a device of a pipeline waits: the bubbles of three schedules by their published formulas.

DeepSeek-V3 (arXiv 2412.19437), table 2, for PP stages, with F, B and W the times of one micro-batch's forward, whole
backward and weight-gradient pass through a stage, and F&B of a forward and a backward pass that hide each other's
communication. ZB1P is Zero Bubble's (arXiv 2401.10241). DualPipe keeps two stages on a device, so twice the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_train.errors import UserError

Schedule = Literal["1f1b", "zb1p", "dualpipe"]


@dataclass(frozen=True)
class Chunk:
    """Seconds of one micro-batch in one stage, communication that nothing hides included; `backward` holds `weight`."""

    forward: float
    backward: float
    weight: float
    overlapped: float  # F&B


def bubble_seconds(schedule: Schedule, stages: int, chunk: Chunk) -> float:
    """Of one device and step. No schedule has one with a single stage."""
    if stages == 1:
        return 0.0
    if schedule == "1f1b":
        return (stages - 1) * (chunk.forward + chunk.backward)
    if schedule == "zb1p":
        return (stages - 1) * max(0.0, chunk.forward + chunk.backward - 2 * chunk.weight)
    return (stages // 2 - 1) * max(0.0, chunk.overlapped + chunk.backward - 3 * chunk.weight)


def alone_chunks(schedule: Schedule, stages: int) -> int:
    """Forward chunks of a step, and as many backward, that DualPipe overlaps with nothing (deepseek-ai/DualPipe)."""
    return stages if schedule == "dualpipe" and stages > 1 else 0


def stages_held(schedule: Schedule, stages: int) -> int:
    """Of weights on one device."""
    return 2 if schedule == "dualpipe" and stages > 1 else 1


def check_schedule(schedule: Schedule, stages: int, micro_batches: int) -> None:
    """Raises UserError where the schedule cannot be run."""
    if schedule != "dualpipe" or stages == 1:
        return
    if stages % 2:
        raise UserError(
            f"pipeline_schedule=dualpipe needs an even pipeline_parallel, not {stages}: choose another, or 1f1b"
        )
    if micro_batches < 2 * stages or micro_batches % 2:
        raise UserError(
            f"pipeline_schedule=dualpipe needs an even number of micro-batches, {2 * stages} or more, "
            f"not {micro_batches}: raise batch_size, lower pipeline_parallel or micro_batch, or choose "
            "pipeline_schedule=1f1b"
        )
