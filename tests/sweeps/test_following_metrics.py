"""Rows of a run are read while it writes them: whole ones, each once, and anew where it went back to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_train.config import StopConfig
from moe_train.sweeps.metrics import MetricsTail, progress


def test_a_row_is_seen_once_and_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.new_rows() == []
    path.write_text('{"step": 1}\n{"step"')
    assert tail.new_rows() == [{"step": 1}]
    assert tail.new_rows() == []
    path.write_text('{"step": 1}\n{"step": 2}\nnonsense\n[3]\n')
    assert tail.new_rows() == [{"step": 2}]
    assert tail.last == {"step": 2}


def test_a_run_that_went_back_is_read_from_its_first_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    tail.new_rows()
    path.write_text('{"step": 1}\n')
    assert tail.new_rows() == [{"step": 1}]


@pytest.mark.parametrize(
    ("limits", "done"),
    [
        ({"steps": 20}, 0.5),
        ({"tokens": 4000}, 0.25),
        ({"tokens": 4000, "seconds": 12.0}, 0.75),
        ({"usd": 0.5}, 0.2),
        ({}, 1.0),
    ],
)
def test_how_far_a_run_is_goes_by_the_limit_it_has_used_most_of(limits: dict[str, Any], done: float) -> None:
    names = ("steps", "tokens", "flops", "seconds", "usd")
    stop = StopConfig(**{name: limits.get(name) for name in names}, default_tokens=500)
    row = {"step": 10, "progress/tokens": 1000, "progress/flops": 1e6, "progress/seconds": 9.0, "cost/usd_total": 0.1}
    assert progress(stop, row) == pytest.approx(done)
    assert progress(stop, None) == 0
