"""One run folder as it stands now: settings under dotted keys, rows of metrics, the figures it came to.

`summary.json` is taken where it is the run's last word. A run that goes on, or was killed after it, has the figures of
its last logged step instead. Older versions left out some names: what a file does not say is None.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import from_json

from moe_train.cost.attempt import KILLED, RUNNING, Attempt
from moe_train.cost.ledger import read_account
from moe_train.cost.shared_ledger import SILENT_SECONDS
from moe_train.dashboard.folders import ACCOUNT, CONFIG, METRICS, SUMMARY
from moe_train.errors import UserError

Number = int | float
Row = dict[str, Any]  # as it was logged: `value` reads it
UNKNOWN_STATUS = "not finished"
MOST = sys.float_info.max

# The compiled loader takes 3 ms a configuration, the other one 26.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SHORT = {"bfloat16": "bf16", "float32": "fp32"}


class Unreadable(Exception):
    """The folder cannot be shown as a run; the text is the reason, the same for all folders that have it."""


@dataclass(frozen=True)
class Run:
    """`summary` is empty where there is none that holds for the run as it stands."""

    folder: Path
    settings: dict[str, Any]  # dotted key -> plain value; lists as they are
    rows: list[Row]  # by step, each with "step"
    summary: dict[str, Any]
    attempts: list[Attempt]
    status: str
    notes: list[str]

    def last(self, name: str) -> Number | None:
        """The newest value of a metric that is one."""
        values = (value(row, name) for row in reversed(self.rows))
        return next((each for each in values if each is not None), None)

    def figure(self, summary_key: str, metric: str | None = None) -> Number | None:
        """A figure of the summary or, where none holds, of the last rows."""
        if self.summary:
            return number(self.summary.get(summary_key))
        return None if metric is None else self.last(metric)

    @property
    def precision(self) -> str | None:
        """The recipe by name; `auto` as the compute format it came to."""
        name = self.settings.get("precision.name", self.summary.get("precision"))
        dtype = self.summary.get("compute_dtype")
        return _SHORT.get(str(dtype), str(dtype)) if name == "auto" and dtype is not None else name

    @property
    def num_experts(self) -> int | str | None:
        """`dense` for a model without a mixture, None where the configuration does not say."""
        if "model.moe" in self.settings:
            return "dense" if self.settings["model.moe"] is None else None
        return number_of_experts(self.settings.get("model.moe.num_experts"))


def number_of_experts(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def number(found: Any) -> Number | None:
    """What was found if it is a finite number, of a size that a float can have."""
    kind = type(found)  # exact, as a bool is no number; and asked a million times
    return found if (kind is float or kind is int) and -MOST <= found <= MOST else None


def value(row: Row, name: str) -> Number | None:
    return number(row.get(name))


def read_run(folder: Path) -> Run:
    """Raises Unreadable where there is no configuration or no row of metrics to show."""
    settings = _settings(folder / CONFIG)
    rows, notes = _rows(folder / METRICS)
    try:
        attempts = read_account(folder / ACCOUNT) if (folder / ACCOUNT).exists() else []
    except (UserError, OSError):
        attempts = []
        notes.append(f"{ACCOUNT} cannot be read")
    summary = _json_object(folder / SUMMARY)
    if summary is None:
        notes.append(f"{SUMMARY} cannot be read")
    last = attempts[-1].status if attempts else None
    if last == RUNNING and _is_silent(attempts[-1]):
        last = KILLED
    steps = number((summary or {}).get("steps"))
    holds = summary and last != RUNNING and (steps is None or not rows or rows[-1]["step"] <= steps)
    if not rows and not holds:
        raise Unreadable("no step is logged yet" if last == RUNNING else "no row of metrics and no summary")
    if not holds:
        summary = {}
    status = str((summary or {}).get("status") or last or UNKNOWN_STATUS)
    return Run(folder, settings, rows, summary or {}, attempts, status, notes)


def _is_silent(attempt: Attempt) -> bool:
    return datetime.now(UTC) - datetime.fromisoformat(attempt.updated_at) > timedelta(seconds=SILENT_SECONDS)


def _settings(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _LOADER)
    except FileNotFoundError:
        raise Unreadable(f"{CONFIG} is missing") from None
    except (OSError, ValueError, yaml.YAMLError):
        raise Unreadable(f"{CONFIG} cannot be read") from None
    if not isinstance(content, dict):
        raise Unreadable(f"{CONFIG} is no configuration of a run")
    try:
        json.dumps(content, default=str, skipkeys=True)
    except (ValueError, RecursionError):  # YAML may hold itself
        raise Unreadable(f"{CONFIG} cannot be read") from None
    return dict(_flat(content, ""))


def _flat(value: Any, key: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and (value or not key):
        return [leaf for name, each in value.items() for leaf in _flat(each, f"{key}.{name}" if key else str(name))]
    return [(key, value)]


def _json_object(path: Path) -> dict[str, Any] | None:
    """Empty where there is no such file, None where it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _rows(path: Path) -> tuple[list[Row], list[str]]:
    """Rows in order of their steps; the later one of two of a step. A last line without its end is being written."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return [], [f"{METRICS} is missing"]
    except OSError:
        return [], [f"{METRICS} cannot be read"]
    lines = text.split("\n")
    by_step: dict[Number, Row] = {}
    unreadable = 0
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        row = _row(line)
        if row is None:
            unreadable += index < len(lines) - 1
            continue
        by_step[row["step"]] = row
    several = "s" if unreadable != 1 else ""
    notes = [f"{unreadable} line{several} of {METRICS} cannot be read"] if unreadable else []
    return [by_step[step] for step in sorted(by_step)], notes


def _row(line: str) -> Row | None:
    try:
        content = from_json(line)  # takes half the time of json.loads
    except ValueError:
        return None
    return content if isinstance(content, dict) and value(content, "step") is not None else None
