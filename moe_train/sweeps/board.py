"""What a person sees of many jobs at once: one live view on a terminal, plain lines elsewhere.

A job's own output goes into its log file; here it is a row with how far it has come and what it has cost so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moe_train.sweeps.job import Job, Outcome
from moe_train.sweeps.running import Running
from moe_train.tracking.console import as_usd

SECONDS_BETWEEN_LINES = 30.0  # of a job, where there is no terminal
WIDE = 120  # columns, in which all figures of a job stand beside its name


class Board:
    """Context manager for the jobs of a sweep of `total`, on stderr by default. None: nobody knows how many."""

    def __init__(
        self, total: int | None = None, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console(stderr=True)
        self._total, self._clock = total, clock
        self._begun = self._there = self._done = self._failed = 0
        self._told_there = 0
        self._last_lines = clock()
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self) -> Board:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tell_what_is_there()
        if self._live is not None:
            self._live.update(Text(""), refresh=True)
            self._live.stop()

    # ------------------------------------------------------------------------------------------------- what happens

    def began(self, job: Job) -> None:
        self._count(f"{job.label}  ({job.hash}.log)")

    def waits_for(self, job: Job) -> None:
        self._count(f"{job.label}  is being made by another process: waiting for it")

    def _count(self, text: str) -> None:
        self._tell_what_is_there()
        self._begun += 1
        self.say(f"[{self._begun + self._there}{'' if self._total is None else f'/{self._total}'}] {text}")

    def ended(self, outcome: Outcome) -> None:
        job = outcome.job
        if outcome.status == "there already":
            self._there += 1
        elif outcome.status == "finished":
            self._done += 1
            self.say(f"  finished: {job.label}")
        else:
            self._failed += 1
            how = "ended" if outcome.status == "ended" else f"failed with exit status {outcome.exit_status}"
            self.say(f"  {how}: {job.label}: {outcome.says}")

    def _tell_what_is_there(self) -> None:
        if self._there > self._told_there:
            of = "" if self._total is None else f" of {self._total}"
            self._told_there = self._there
            self.say(f"{self._there}{of} runs are there already")

    def say(self, text: str) -> None:
        """One line, above the view where there is one."""
        self.console.print(Text(text), soft_wrap=True)

    # ------------------------------------------------------------------------------------------------- what goes on

    def show(self, running: Sequence[Running]) -> None:
        """The jobs as they are now."""
        if self._live is not None:
            self._live.update(self._view(running), refresh=True)
        elif self._clock() - self._last_lines >= SECONDS_BETWEEN_LINES:
            self._last_lines = self._clock()
            for each in running:
                self.say(f"  {each.progress:4.0%}  {each.job.label}  {'  '.join(f for f in figures(each) if f)}")

    def _view(self, running: Sequence[Running]) -> Group:
        """A row a job, its name cut where there is no room; on a narrow terminal without a bar, speed and hash."""
        wide = self.console.width >= WIDE
        table = Table(box=None, pad_edge=False, show_header=False, expand=True)  # what is left is the name's
        table.add_column(overflow="ellipsis", no_wrap=True, ratio=1)
        for _ in range(7 if wide else 4):
            table.add_column(justify="right", no_wrap=True)
        for each in running:
            loss, speed, usd, left = figures(each)
            bar = ProgressBar(total=1.0, completed=each.progress, width=16)
            share = f"{each.progress:.0%}"
            cells = (bar, share, loss, speed, usd, left, each.job.hash) if wide else (share, loss, usd, left)
            table.add_row(Text(each.job.label), *cells)
        known = [f"{len(running)} running", f"{self._done + self._there} there"]
        known += [f"{self._failed} without a result"] if self._failed else []
        if self._total is not None:
            known.append(f"{self._total - self._done - self._there - self._failed - len(running)} to come")
        return Group(table, Text(", ".join(known)))


def figures(running: Running) -> list[str]:
    """Loss, tokens/s, dollars so far and time left, empty where not known yet."""
    row = running.tail.last or {}
    loss, speed, usd = (row.get(key) for key in ("train/loss", "throughput/tokens_per_second", "cost/usd_total"))
    left = running.seconds_left
    return [
        "" if loss is None else f"loss {loss:.4f}",
        "" if speed is None else f"{speed:,.0f} tokens/s",
        "" if usd is None else as_usd(usd),
        "" if left is None else f"{timedelta(seconds=round(left))} left",
    ]
