"""What is seen of many jobs: a view that is drawn anew on a terminal, a few plain lines anywhere else."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from sleeping_jobs import Ended

from moe_train.sweeps.board import Board
from moe_train.sweeps.job import Job, Outcome
from moe_train.sweeps.metrics import MetricsTail
from moe_train.sweeps.running import Running

ROW = {
    "step": 250_000,
    "train/loss": 2.5,
    "throughput/tokens_per_second": 1234.0,
    "cost/usd_total": 0.0123,
    "progress/tokens": 250_000,
}
FIGURES = ("25%", "loss 2.5000", "1,234 tokens/s", "$0.0123")


def running(folder: Path, job: Job) -> Running:
    """A job that has logged a quarter of its million tokens."""
    (folder / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    tail = MetricsTail(folder / "metrics.jsonl")
    tail.new_rows()
    return Running(job, Ended(), tail, 0, None)


def board(terminal: bool, clock: Callable[[], float] = lambda: 0.0, width: int = 160) -> tuple[Board, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width, legacy_windows=False)
    return Board(total=3, console=console, clock=clock), file


def test_a_terminal_shows_how_far_each_job_is_and_what_it_costs(tmp_path: Path, job: Callable[[int], Job]) -> None:
    shown, file = board(terminal=True)
    with shown:
        shown.ended(Outcome(job(1), "finished"))
        shown.show([running(tmp_path, job(0))])
    text = file.getvalue()
    for part in ("seed=0", job(0).hash, *FIGURES, "1 running, 1 there, 1 to come"):
        assert part in text


def test_on_a_narrow_terminal_names_are_cut_and_no_figure_is(tmp_path: Path, job: Callable[[int], Job]) -> None:
    shown, file = board(terminal=True, width=80)
    named = dataclasses.replace(job(0), label="model.moe.num_experts=16 " * 5)
    with shown:
        shown.show([running(tmp_path, named)])
    text = file.getvalue()
    for part in ("model.moe.num_experts=16 model", "…", "25%", "loss 2.5000", "$0.0123"):
        assert part in text


def test_time_left_is_told_once_a_run_that_goes_on_has_left_where_it_stood(
    tmp_path: Path, job: Callable[[int], Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    each = running(tmp_path, job(0))
    lefts = []
    for now[0], tokens in ((0.0, 250_000), (60.0, 250_000), (61.0, 260_000), (71.0, 360_000)):  # a minute to start in
        each.tail.last = {**ROW, "progress/tokens": tokens}
        lefts.append(each.seconds_left)
    assert lefts[:3] == [None, None, None]
    assert lefts[3] == pytest.approx(64)  # 640,000 tokens at 10,000 a second


def test_elsewhere_there_are_lines_of_what_happens_and_now_and_then_of_what_goes_on(
    tmp_path: Path, job: Callable[[int], Job]
) -> None:
    now = [0.0]
    shown, file = board(terminal=False, clock=lambda: now[0])
    with shown:
        shown.ended(Outcome(job(1), "there already"))
        shown.began(job(0))
        for now[0] in (1.0, 2.0, 31.0, 32.0):
            shown.show([running(tmp_path, job(0))])
        shown.ended(Outcome(job(0), "failed", 1, "it went wrong"))
    lines = file.getvalue().splitlines()
    assert lines[0] == "1 of 3 runs are there already"
    assert lines[1] == f"[2/3] seed=0  ({job(0).hash}.log)"
    assert lines[2].split("  ")[1:] == [" 25%", "seed=0", *FIGURES[1:]]
    assert lines[3:] == ["  failed with exit status 1: seed=0: it went wrong"]
    assert "\x1b" not in file.getvalue()
