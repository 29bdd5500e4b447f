"""How far a run is, while it runs: a live panel on a terminal, a line now and then elsewhere, or nothing.

All of it comes from the rows that are logged anyway, so looking costs no device a wait. What is left, in seconds and
dollars, is judged by what this attempt took to come from its first logged step to its last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.text import Text

from moe_train.config.hardware import ConsoleChoice
from moe_train.errors import UserError
from moe_train.tracking.console import as_duration, as_usd, stderr_console

Row = Mapping[str, float | None]
_SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class Standing:
    """A run at a logged step."""

    fraction: float  # of the run, 0 to 1
    step: int
    row: Row  # what was logged, under the metrics' names
    usd: float | None  # the whole bill so far
    seconds_left: float | None  # to the last step
    usd_at_end: float | None  # the whole bill, if it goes on like this; None after the last step too


class Progress:
    """Context manager that shows where a run stands after each logged step; subclasses say how."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start: tuple[float, float] | None = None  # time and fraction of the first update

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    def update(
        self, fraction: float, *, step: int, row: Row, usd: float | None, usd_ahead: Callable[[float], float]
    ) -> None:
        """Show a logged step at `fraction` of the run. `usd_ahead`: what so many seconds more and the end will cost."""
        now = self._clock()
        if self._start is None:
            self._start = (now, fraction)
        done = fraction - self._start[1]
        left = (now - self._start[0]) * max(0.0, 1 - fraction) / done if done > 0 else None
        at_end = None if usd is None or not left else usd + usd_ahead(left)
        self.show(Standing(fraction, step, row, usd, left, at_end))

    def show(self, standing: Standing) -> None:
        raise NotImplementedError


class Lines(Progress):
    """A line every few seconds and one for the last step: for a log file or a job's output."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._console = console or stderr_console()
        self._last_line = -float("inf")

    def show(self, standing: Standing) -> None:
        now = self._clock()
        if now - self._last_line < _SECONDS_BETWEEN_LINES and standing.fraction < 1:
            return
        self._last_line = now
        loss, rate = (standing.row.get(name) for name in ("train/loss", "throughput/tokens_per_second"))
        figures = [
            f"{standing.fraction:4.0%}",
            f"step {standing.step:,}",
            "loss not known" if loss is None else f"loss {loss:.4f}",
            "tokens/s not known" if rate is None else f"{rate:,.0f} tokens/s",
            "cost not known" if standing.usd is None else as_usd(standing.usd),
        ]
        if standing.seconds_left is not None:
            figures.append(f"{as_duration(standing.seconds_left)} left")
        self._console.print(Text("  ".join(figures)), soft_wrap=True)


def check_console(choice: ConsoleChoice) -> None:
    """Raises UserError where a panel is asked for and there is no terminal to draw it on."""
    if choice == "panel" and not _can_redraw(stderr_console()):
        raise UserError("tracking.console=panel needs a terminal, and stderr is none: choose auto or lines")


def open_progress(choice: ConsoleChoice, title: str) -> Progress | None:
    """The display that `tracking.console` asks for, on stderr, so that stdout is left to results. None: no display."""
    if choice == "none":
        return None
    if choice == "lines" or not _can_redraw(stderr_console()):
        return Lines()
    from moe_train.tracking.panel import Panel

    return Panel(title)


def _can_redraw(console: Console) -> bool:
    """Asked of the stream too: FORCE_COLOR makes rich take a log file for a terminal."""
    return console.file.isatty() and console.is_interactive
