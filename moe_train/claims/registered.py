"""What was fixed before the first run: margins, seeds, budgets, arms. A suite that has begun keeps to it.

`OUT/registered/CLAIM-SCALE.json` is written before training. If the claim, or what its arms resolve to, has changed
since, the suite is refused: a margin moved after the losses are known is no margin.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from moe_train.claims.plan import Plan
from moe_train.claims.results import Folder, Result
from moe_train.cli import write_json
from moe_train.config import differences, to_dict
from moe_train.config.claim import ScaleConfig, TuningConfig
from moe_train.cost.ledger import read_account
from moe_train.errors import UserError

# What may be worded better at any time. The statement may not: its opposite would have the opposite verdict.
_PROSE = ("source", "published", "carries_over", "does_not_carry_over", "number", "scales")


def protocol(plan: Plan) -> dict[str, Any]:
    """Everything that decides a verdict, as plain values; what a user gave for all arms is in their hashes."""
    claim = {key: value for key, value in to_dict(plan.claim.config).items() if key not in _PROSE}
    return {
        "claim": claim,
        "scale": to_dict(plan.scale),
        "arms": {name: arm.config.config_hash() for name, arm in plan.arms.items()},
    }


def _defaults(settings: type) -> dict[str, Any]:
    return {each.name: each.default for each in fields(settings) if each.default is not MISSING}


def _by_place(value: Any) -> Any:
    """Lists of several settings as dictionaries, so that what differs in one of them can be named."""
    if isinstance(value, dict):
        return {key: _by_place(each) for key, each in value.items()}
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return {str(nth): _by_place(each) for nth, each in enumerate(value)}
    return value


def file_of(plan: Plan, folder: Folder) -> Path:
    return folder.path / "registered" / f"{plan.claim.name}-{plan.scale_name}.json"


def check(plan: Plan, folder: Folder) -> str | None:
    """When it was registered; None if it was not. Raises UserError where it has changed since."""
    file = file_of(plan, folder)
    if not file.exists():
        return None
    try:
        before = json.loads(file.read_text())
        date: str = before["date"]
        was = before["protocol"]
        was["claim"].setdefault("statement", plan.claim.config.statement)  # of a protocol from before it was kept
        was["scale"] = _defaults(ScaleConfig) | was["scale"]  # settings that it did not know
        if was["scale"]["tuning"] is not None:
            was["scale"]["tuning"] = _defaults(TuningConfig) | was["scale"]["tuning"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} cannot be read: put it back, or give another out=") from None
    for key, old, new in differences(_by_place(was), _by_place(json.loads(json.dumps(protocol(plan))))):
        raise UserError(
            f"claim={plan.claim.name} scale={plan.scale_name} was registered on {date} with {key}={json.dumps(old)}, "
            f"not {json.dumps(new)}: runs are there, so restore it, or give another out="
        )
    return date


def older(plan: Plan, folder: Folder, results: Sequence[Result]) -> int:
    """How many runs began before the protocol was written: their losses may have been known."""
    file = file_of(plan, folder)
    if not file.exists():
        return 0
    # A run dates itself by its process, whose beginning the system knows to a hundredth of a second.
    date = datetime.fromisoformat(json.loads(file.read_text())["date"]) - timedelta(milliseconds=50)
    first = {r.run.hash: read_account(r.folder / "ledger.json")[:1] for r in results}
    return sum(datetime.fromisoformat(each.started_at) < date for attempts in first.values() for each in attempts)


def register(plan: Plan, folder: Folder) -> str:
    """Write it down before training; returns the date, of the first time if there was one."""
    if date := check(plan, folder):
        return date
    file = file_of(plan, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).isoformat(timespec="milliseconds")
    write_json(file, {"date": date, "protocol": protocol(plan)})
    return date
