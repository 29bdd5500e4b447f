"""A search in the terminal: the best settings of every study, what came to nothing, the front, the rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_train.search.space import as_text
from moe_train.tracking.console import as_usd

SHOWN = 8  # of a study; trials.json has all


def show(content: dict[str, Any], console: Console | None = None) -> None:
    """`content` is report.content's; to stdout by default."""
    console = console or Console()

    def say(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    say(content["question"])
    for study in content["studies"]:
        points = study["points"]
        if points:
            console.print(_table(study["study"], points[:SHOWN], content["objectives"]))
        more = len(points) - SHOWN
        lost = study["without_result"]
        words = [f"{more} more in trials.json"] if more > 0 else []
        words += [f"{lost[kind]} {what}" for kind, what in _KINDS.items() if lost[kind]]
        if words or not points:
            say(f"{study['study']}: {', '.join(words) or 'no run yet'}")
        for reason in lost["reasons"][:3]:
            say(f"  failed: {reason}")
    if content["front"]:
        console.print(_table("Pareto front", content["front"], content["objectives"]))
    if content["rule"]:
        for line in rule_lines(content["rule"]):
            say(line)
    if content["usd_spent"] is not None:
        say(f"{as_usd(content['usd_spent'])} spent on this search; runs in {content['runs']}")


_HEADS = {"val_bits_per_byte": "bits/byte", "usd_total": "dollars", "usd_train": "dollars of training"}
_KINDS = {"pruned": "given up early", "failed": "failed", "going": "to go on"}


def _table(title: str, points: Sequence[dict[str, Any]], objectives: Sequence[str]) -> Table:
    spread = any(point["spread"] is not None for point in points)
    caption = "±: half of what lies between the best and the worst seed" if spread else None
    table = Table(title=Text(title), title_justify="left", caption=caption, caption_justify="left")
    keys = list(dict.fromkeys(key for point in points for key in point["settings"]))
    for key in keys:
        table.add_column(Text(_short(key, keys)), overflow="fold")
    for objective in objectives:
        table.add_column(_HEADS.get(objective, objective), justify="right")
    shows_usd = "usd_total" not in objectives
    if shows_usd:
        table.add_column(_HEADS["usd_total"], justify="right")
    table.add_column("runs", overflow="fold")
    for point in points:
        usd = point["figures"]["usd_total"]
        values = [_value(name, value) for name, value in zip(objectives, point["values"])]
        if point["spread"] is not None:
            values[0] += f" ± {point['spread'] / 2:.4f}"
        table.add_row(
            *(Text(as_text(point["settings"].get(key))) for key in keys),
            *values,
            *([("" if usd is None else as_usd(usd))] if shows_usd else []),
            " ".join(point["runs"]),
        )
    return table


def _short(key: str, keys: Sequence[str]) -> str:
    """Its last part, where that is enough to know it by."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def _value(name: str, value: float) -> str:
    return as_usd(value) if name.startswith("usd") else f"{value:.4f}" if value < 1000 else f"{value:,.0f}"


def rule_lines(rule: dict[str, Any]) -> list[str]:
    """The rule, what it was fitted through, and where it cannot be trusted."""
    x, y = rule["x"], rule["y"]
    lines = [f"best {y} = {best['y']:.4g} at {x} = {best['x']:.4g} ({best['how']})" for best in rule["bests"]]
    if rule["a"] is None:
        return [*lines, f"no rule yet: it takes two studies with runs at different {x}"]
    error = rule["standard_error"]
    sure = "two points, so nothing says how far off" if error is None else f"standard error of the exponent {error:.2g}"
    lines.append(f"rule: {y} = {rule['c']:.4g} × {x}^{rule['a']:.3f} ({sure})")
    if edges := [best for best in rule["bests"] if best["how"] == "edge"]:
        lines.append(f"{len(edges)} of them lie at the edge of what was tried: widen the range before trusting it")
    return lines
