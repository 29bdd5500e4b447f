"""The live panel: loss, speed, utilisation, dollars, load of the experts, redrawn in place below all that is said.

The terminal's cursor stays visible and no mode of it is changed, so that there is nothing to put back, however the
process ends. The panel is drawn after logged steps, at most twice a second, and once a second for the clock.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel as Frame
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moe_train.tracking.console import as_bytes, as_duration, as_usd, stderr_console
from moe_train.tracking.progress import Progress, Row, Standing

_SECONDS_BETWEEN_DRAWINGS = 0.5
_TICKS_PER_SECOND = 1.0
_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARKS = 24  # characters of the loss curve
_NARROW, _WIDEST = 36, 100  # columns: below the first, names and values share one


class Panel(Progress):
    """On `console`, a terminal; by default stderr's. `title` names the run."""

    def __init__(self, title: str, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._title = title
        self._console = console or stderr_console()
        self._standing: Standing | None = None
        self._losses: list[float] = []
        self._latest: dict[str, float | None] = {}  # validation is not in every row
        self._began = self._shown_at = self._drawn_at = clock()
        self._live = Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=_TICKS_PER_SECOND,
            redirect_stdout=sys.stdout.isatty(),  # else it goes to a file, and has to stay there
        )
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> Panel:
        before = sys.stderr
        self._live.start()
        self._console.show_cursor(True)
        self._restore.enter_context(_log_handlers_moved(before, sys.stderr))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore.close()
        self._live.stop()

    def show(self, standing: Standing) -> None:
        now = self._clock()
        loss = standing.row.get("train/loss")
        if loss is not None:
            self._losses.append(loss)
        self._latest |= standing.row
        self._standing, self._shown_at = standing, now
        if now - self._drawn_at >= _SECONDS_BETWEEN_DRAWINGS:
            self._drawn_at = now
            self._live.refresh()

    def _render(self) -> RenderableType:
        """Called by the drawing thread too: reads what `show` has put there whole."""
        standing, now = self._standing, self._clock()
        if standing is None:
            return self._framed(Text(f"{as_duration(now - self._began)}, no step logged yet"))
        left = standing.seconds_left
        if left is not None:
            left = max(0.0, left - (now - self._shown_at))
        figures = _table(_figures(standing, self._latest, self._losses), narrow=self._width < _NARROW)
        how_far = [f"{standing.fraction:.0%}", f"step {standing.step:,}", f"{as_duration(now - self._began)} so far"]
        how_far += [] if left is None else [f"{as_duration(left)} left"]
        bar = Padding(ProgressBar(total=1.0, completed=standing.fraction), 0)  # by itself it ends no line
        return self._framed(Group(bar, Text("  ".join(how_far)), figures))

    @property
    def _width(self) -> int:
        # Where the frame reached the edge, the terminal's own ^C would begin a line that rich does not know of.
        return min(self._console.width - 4, _WIDEST)

    def _framed(self, content: RenderableType) -> RenderableType:
        title = Text(self._title)
        title.truncate(self._width - 6, overflow="ellipsis")  # a frame grows with its title
        return Frame(content, title=title, width=self._width)


def _table(figures: Sequence[tuple[str, str]], narrow: bool) -> Table:
    table = Table.grid(padding=(0, 2))
    if not narrow:
        table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in figures:
        table.add_row(*([Text(f"{name} {value}")] if narrow else [Text(name), Text(value)]))
    return table


def _figures(standing: Standing, latest: Row, losses: Sequence[float]) -> list[tuple[str, str]]:
    """Names and values of the panel's lines."""

    def known(name: str, form: str) -> str:
        value = latest.get(name)
        return "not known" if value is None else form.format(value)

    loss = f"{known('train/loss', '{:.4f}')}  {curve(losses)}"
    rows = [("loss", loss)]
    if "val/loss" in latest:
        bits = known("val/bits_per_byte", "{:.4f}")
        rows.append(("validation", f"{known('val/loss', '{:.4f}')}, {bits} bits per byte"))
    rows.append(("tokens/s", known("throughput/tokens_per_second", "{:,.0f}")))
    rows.append(("utilisation", known("throughput/model_flops_utilization", "{:.1%}")))
    at_end = standing.usd_at_end
    cost = "not known" if standing.usd is None else f"{as_usd(standing.usd)} so far"
    rows.append(("cost", cost if at_end is None else f"{cost}, {as_usd(at_end)} at the end"))
    if (sent := latest.get("comm/bytes")) is not None:
        rows.append(
            ("exchanged", f"{as_bytes(sent)} a step, {known('comm/exposed_fraction', '{:.1%}')} of the time waited for")
        )
    if (load := _expert_load(latest)) is not None:
        rows.append(("expert load", load))
    return rows


def _expert_load(row: Row) -> str | None:
    """None in a dense model."""
    worst = row.get("moe/max_violation")
    if worst is None:
        return None
    layers = 0
    while f"moe/layer_{layers}/max_violation" in row:
        layers += 1
    by_layer = [row.get(f"moe/layer_{layer}/max_violation") or 0.0 for layer in range(layers)]
    text = f"fullest {1 + worst:.2f} × mean  {''.join(_block(violation) for violation in by_layer)} by layer"
    if dead := row.get("moe/dead_experts"):
        text += f", {dead:.0f} dead"
    if (dropped := row.get("moe/dropped_fraction")) is not None:
        text += f", {dropped:.1%} dropped"
    return text


def curve(values: Sequence[float], width: int = _SPARKS) -> str:
    """The course of `values` in at most `width` characters, each the mean of its stretch, from lowest to highest."""
    count = min(width, len(values))
    bounds = [len(values) * index // count for index in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    return "".join(_block((mean - low) / (high - low) if high > low else 0.0) for mean in means)


def _block(height: float) -> str:
    """A character as high as `height`, from 0 to 1 and beyond."""
    return _BLOCKS[min(len(_BLOCKS) - 1, int(height * len(_BLOCKS)))]


@contextlib.contextmanager
def _log_handlers_moved(before: object, now: object) -> Iterator[None]:
    """Within, the handlers of libraries that took hold of stderr when they were imported write above the panel too."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {
        handler
        for logger in loggers
        for handler in getattr(logger, "handlers", ())
        if isinstance(handler, logging.StreamHandler) and handler.stream is before
    }
    for handler in handlers:
        handler.setStream(now)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(before)
