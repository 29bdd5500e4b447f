"""Plans and verdicts as tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_train.claims.estimate import Estimate
from moe_train.claims.plan import Plan
from moe_train.claims.statements import power_statements
from moe_train.claims.words import dollars, effect, interval, word
from moe_train.forecast.interval import NOTHING, Interval

if TYPE_CHECKING:
    from moe_train.claims.verdict import Judged


def show_estimates(rows: Sequence[tuple[Plan, Estimate]], scale: str) -> None:
    table = Table(title=f"what scale={scale} would take", title_justify="left")
    table.add_column("claim", overflow="fold")
    for column in ("arms", "runs", "there", "FLOPs", "hours", "dollars"):
        table.add_column(column, justify="right")
    for plan, row in rows:
        paid = "no price" if row.usd is None else _spread(row.usd)
        table.add_row(
            *(plan.claim.name, str(len(plan.arms)), str(row.runs), str(row.there), f"{row.flops:.2e}"),
            *(_spread(row.seconds * (1 / 3600)), paid),
        )
    seconds, usd = _total(rows)
    table.add_section()
    table.add_row(
        *("all, shared runs once", "", str(sum(row.runs for _, row in rows)), str(sum(row.there for _, row in rows))),
        *(f"{sum(row.flops for _, row in rows):.2e}", _spread(seconds * (1 / 3600))),
        "no price" if usd is None else _spread(usd),
    )
    console = Console()
    console.print(table)
    for source in dict.fromkeys(row.source for _, row in rows):
        console.print(Text(source), soft_wrap=True)
    for plan, _ in rows:
        if (tuning := plan.scale.tuning) is not None and tuning.widenings:
            more = 2 * tuning.widenings * tuning.seeds * len(plan.arms)
            said = f"{plan.claim.name}: at most {more} runs more for learning rates, where the best are at an edge"
            console.print(Text(said), soft_wrap=True)
        for statement, sees in power_statements(plan):
            console.print(Text(f"{plan.claim.name}: {statement}: {sees}"), soft_wrap=True)


def _total(rows: Sequence[tuple[Plan, Estimate]]) -> tuple[Interval, Interval | None]:
    seconds = sum((row.seconds for _, row in rows), NOTHING)
    known = [row.usd for _, row in rows if row.usd is not None]
    return seconds, sum(known, NOTHING) if len(known) == len(rows) else None


def _spread(interval: Interval) -> str:
    value, low, high = (f"{each:.2g}" for each in (interval.value, interval.low, interval.high))
    return f"{value} ({low} to {high})"


def as_dict(plan: Plan, row: Estimate) -> dict[str, Any]:
    return {
        "claim": plan.claim.name,
        "scale": plan.scale_name,
        "verdict": None,
        "effect": None,
        "interval": None,
        "runs": row.runs,
        "runs_there": row.there,
        "flops": row.flops,
        "seconds": asdict(row.seconds),
        "usd": None if row.usd is None else row.usd.value,
        "usd_interval": None if row.usd is None else [row.usd.low, row.usd.high],
        "source": row.source,
        "power": [{"comparison": statement, "power": sees} for statement, sees in power_statements(plan)],
    }


def show_verdicts(judged: Sequence[Judged]) -> None:
    table = Table(title="verdicts", title_justify="left")
    for column in ("claim", "effect", "interval", "verdict"):
        table.add_column(column, overflow="fold", no_wrap=column == "verdict")
    for column in ("runs", "dollars"):
        table.add_column(column, justify="right")
    for each in judged:
        runs = f"{each.made} of {each.planned}"
        table.add_section()
        table.add_row(each.plan.claim.name, "", "", each.verdict, runs, dollars(each.usd), style="bold")
        for compared in each.comparisons:
            if compared.decides:
                shown = asdict(compared)
                verdict = word(compared.verdict, each.plan.scale_name)
                table.add_row(compared.statement, effect(shown), interval(shown), verdict)
    console = Console()
    console.print(table)
    for each in judged:
        not_computed = [c.reason for c in each.comparisons if c.decides and c.reason]
        for reason in [*each.reasons[:3], *dict.fromkeys(not_computed)]:
            console.print(Text(f"{each.plan.claim.name}: {reason}"), soft_wrap=True)
