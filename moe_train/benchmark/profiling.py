"""profile=true: where a step's time and memory go, of the model of suite=step."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from moe_train.benchmark import step
from moe_train.benchmark.arms import TrainingArm
from moe_train.benchmark.bench import Bench, described
from moe_train.benchmark.tables import device_line

_STEPS = 3
_ROWS = 20


def run(bench: Bench, out: Path) -> Path:
    """Three warm steps in `out`: trace.json (chrome://tracing, with memory), operations.txt, on CUDA memory.pickle.

    The trace has the allocations in the order they happen, the CPU's memory timeline; memory.pickle is for
    https://docs.pytorch.org/memory_viz.
    """
    config = bench.config(*step.usual(bench))
    arm = TrainingArm(config, bench.runtime)
    for _ in range(2):
        arm.step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if bench.on_gpu else [])
    if bench.on_gpu:
        torch.cuda.memory._record_memory_history()
    with profile(activities=activities, record_shapes=True, profile_memory=True) as found:
        for _ in range(_STEPS):
            arm.step()
    if bench.on_gpu:
        torch.cuda.memory._dump_snapshot(str(out / "memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
    found.export_chrome_trace(str(out / "trace.json"))
    by = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    memory = "self_device_memory_usage" if bench.on_gpu else "self_cpu_memory_usage"
    of = f"{described(config, bench.runtime)}; {device_line(bench.runtime)}, {date.today()}"
    rows = slowest(found.key_averages(), by)
    Console().print(_table(rows, of))
    texts = [
        f"{of}, {_STEPS} steps",
        found.key_averages().table(sort_by=by, row_limit=60),
        found.key_averages(group_by_input_shape=True).table(sort_by=by, row_limit=60, max_shapes_column_width=60),
        found.key_averages().table(sort_by=memory, row_limit=30),
    ]
    (out / "operations.txt").write_text("\n\n".join(texts))
    return out


def slowest(events: Any, by: str) -> list[tuple[str, float, float, float]]:
    """Operation, milliseconds a step of its own, share of all, calls a step; longest first."""
    total = sum(getattr(event, by) for event in events) or 1
    ordered = sorted(events, key=lambda event: getattr(event, by), reverse=True)[:_ROWS]
    return [
        (event.key, getattr(event, by) / 1e3 / _STEPS, getattr(event, by) / total, event.count / _STEPS)
        for event in ordered
    ]


def _table(rows: list[tuple[str, float, float, float]], of: str) -> Table:
    table = Table(title=f"slowest operations of a step, under the profiler: {of}", title_justify="left")
    for column in ("operation", "ms", "share", "calls"):
        table.add_column(column, justify="left" if column == "operation" else "right", overflow="fold")
    for name, milliseconds, share, calls in rows:
        table.add_row(name, f"{milliseconds:,.1f}", f"{share:.1%}", f"{calls:,.0f}")
    return table
