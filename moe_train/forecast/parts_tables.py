"""A run put together from parts, as tables in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_train.tracking.console import as_usd


def show_parts(content: dict[str, Any], console: Console | None = None) -> None:
    console = console or Console()
    hours, by_part, hidden = content["gpu_hours"], content["gpu_hours_by_part"], content["hidden_gpu_hours"]
    table = Table(
        title=f"{content['model']}: {content['tokens']:,} tokens on {content['num_devices']} × {content['hardware']}, "
        f"{content['precision']}, {layout_in_words(content['layout'])}",
        title_justify="left",
    )
    table.add_column("where the hours go")
    for column in ("GPU-hours", "share", "hidden behind others"):
        table.add_column(column, justify="right")
    for name in sorted({**by_part, **hidden}, key=lambda name: -by_part.get(name, 0.0)):
        part, behind = by_part.get(name, 0.0), hidden.get(name)
        table.add_row(name, f"{part:,.0f}", f"{part / hours:.1%}", "" if behind is None else f"{behind:,.0f}")
    table.add_section()
    table.add_row("together", f"{hours:,.0f}", "", "")
    console.print(table)
    lines = [f"{content['tokens_per_second_per_gpu']:,.0f} tokens/s and GPU, {content['step_seconds']:.2f} s a step"]
    if content["usd"] is not None:
        lines.append(f"{as_usd(content['usd'])} of rent")
    if content["published_gpu_hours"] is not None:
        published = content["published_gpu_hours"]
        side = "fewer" if hours < published else "more"
        lines.append(
            f"published: {published:,.0f} GPU-hours; the parts come to {abs(hours / published - 1):.1%} {side}"
        )
    states, memory = content["state_bytes"], content["memory_bytes"]
    if memory is not None:
        fits = "" if states <= memory else ": it cannot be trained in this layout"
        lines.append(f"{states / 1e9:,.1f} GB of states on each device of {memory / 1e9:,.0f} GB{fits}")
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    _show_limits(content, console)
    for note in (*content["notes"], "rates measured by others: " + "; ".join(content["sources"])):
        console.print(Text(f"- {note}"), soft_wrap=True)


def _show_limits(content: dict[str, Any], console: Console) -> None:
    table = Table(title="what limits it, in the fastest layout that fits", title_justify="left")
    for index, column in enumerate(("devices", "layout", "GPU-hours", "limit", "its share")):
        table.add_column(column, justify="left" if index in (1, 3) else "right", overflow="fold")
    for row in content["limits"]:
        if row["fits"]:
            words = (layout_in_words(row["layout"]), f"{row['gpu_hours']:,.0f}", row["limit"], f"{row['share']:.1%}")
        else:
            held = f": {row['state_bytes'] / 1e9:,.0f} GB of states on each" if row["state_bytes"] else ""
            words = ("none", "", row["limit"] + held, "")
        table.add_row(f"{row['num_devices']:,}", *words)
    console.print(table)


def layout_in_words(layout: dict[str, Any]) -> str:
    words = []
    if layout["pipeline_parallel"] > 1:
        words.append(f"{layout['pipeline_parallel']} stages ({layout['schedule']})")
    if layout["expert_parallel"] > 1:
        words.append(f"experts over {layout['expert_parallel']}")
    return ", ".join([*words, layout["sharding"]])
