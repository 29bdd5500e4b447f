"""A claim's verdict as a run of its own in wandb, in the group of the runs it rests on."""

from __future__ import annotations

import dataclasses
import re
import shutil
from typing import Any

from moe_train.claims.plan import Plan
from moe_train.claims.registered import protocol
from moe_train.claims.results import Folder
from moe_train.tracking.tracker import Tracker

_FIGURES = ("claim", "scale", "verdict", "effect", "unit", "p_supported", "runs", "planned_runs", "usd", "statement")
_OF_EACH = ("verdict", "effect", "unit", "p_supported", "decides")


def write(plan: Plan, entry: dict[str, Any], folder: Folder) -> None:
    """As tracking is set for the arms: offline unless a key is there, nothing with tracking=none."""
    config = next(iter(plan.arms.values())).config.tracking
    if config.wandb == "off":
        return
    place = folder.path / "verdicts" / f"{plan.claim.name}-{plan.scale_name}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    name = f"{plan.claim.name}-verdict"
    tags = ("verdict", plan.scale_name, entry["verdict"])
    run_id = re.sub(r"[^\w-]", "_", f"{name}-{plan.scale_name}-{entry['registered'] or ''}")[:64]
    tracking = dataclasses.replace(config, group=plan.claim.name, tags=tags)
    tracker = Tracker(place, tracking, protocol(plan), name, run_id, resume_step=None)
    tracker.finish(figures(entry))


def figures(entry: dict[str, Any]) -> dict[str, Any]:
    """Of the claim, and of each of its comparisons: those that do not decide as well."""
    found = {key: entry[key] for key in _FIGURES} | _bounds(entry)
    for nth, each in enumerate(entry["comparisons"], start=1):  # two may differ in their test alone
        name = f"{nth}_{each['measure']}/{each['arm']}_against_{each['against']}"
        of = {key: each[key] for key in _OF_EACH} | _bounds(each)
        found |= {f"{name}/{key}": value for key, value in of.items()}
    return found


def _bounds(judged: dict[str, Any]) -> dict[str, float | None]:
    low, high = judged["interval"] or (None, None)
    return {"interval_low": low, "interval_high": high}
