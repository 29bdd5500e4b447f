"""Everything the page shows, as plain values: runs, the settings in which they differ, spending, verdicts, notes.

A setting is written once with the values it takes, and each run keeps the index of its own: of two hundred keys a few
differ. Runs that have not changed since the last look are not read again, which makes a served page cheap to refresh.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moe_train.cost.attempt import RUNNING, Attempt
from moe_train.cost.value import RAW_BITS_PER_BYTE
from moe_train.dashboard.curves import points_each
from moe_train.dashboard.entries import Entry, entry
from moe_train.dashboard.folders import ACCOUNT, CONFIG, METRICS, SUMMARY, find_run_folders
from moe_train.dashboard.runs import Unreadable, read_run
from moe_train.dashboard.spending import spending
from moe_train.dashboard.verdicts import verdicts

Stamp = tuple[tuple[int, int] | None, ...]
_EXAMPLES = 5  # folders named for each reason to leave some out


@dataclass(frozen=True)
class _Known:
    stamp: Stamp
    most: int  # points of a curve
    entry: Entry | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    attempts: Sequence[Attempt] = ()
    reason: str | None = None  # why there is no entry


class Source:
    """Reads the runs of a glob, a ledger and a report of claims, again and again."""

    def __init__(self, pattern: str, ledger: Path, claims: Path) -> None:
        self.pattern, self.ledger, self.claims = pattern, ledger, claims
        self._known: dict[Path, _Known] = {}

    def read(self) -> dict[str, Any]:
        folders = find_run_folders(self.pattern)
        most = points_each(len(folders))
        self._known = {folder: self._look(folder, most) for folder in folders}
        shown = [(folder, known) for folder, known in self._known.items() if known.entry is not None]
        keys, indices = _settings([known.settings for _, known in shown])
        # Where the folders have a parent in common, it says nothing.
        parent = Path(os.path.commonpath([folder.parent for folder in folders])) if folders else Path()
        runs = [
            {"folder": str(folder.relative_to(parent)), **(known.entry or {}), "settings": index}
            for (folder, known), index in zip(shown, indices)
        ]
        return {
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "max_points": most,
            "raw_bits_per_byte": RAW_BITS_PER_BYTE,
            "settings": keys,
            "runs": runs,
            "left_out": _left_out(self._known, parent),
            "spending": spending(self.ledger, [each for _, known in shown for each in known.attempts]),
            "claims": verdicts(self.claims),
        }

    def _look(self, folder: Path, most: int) -> _Known:
        known, stamp = self._known.get(folder), _stamp(folder)
        # One that runs becomes one that was killed without writing anything.
        still = known and (known.entry is None or known.entry["status"] != RUNNING)
        if known and still and (known.stamp, known.most) == (stamp, most):
            return known
        try:
            run = read_run(folder)
        except Unreadable as reason:
            return _Known(stamp, most, reason=str(reason))
        return _Known(stamp, most, entry(run, most), run.settings, tuple(run.attempts))


def _stamp(folder: Path) -> Stamp:
    stamps: list[tuple[int, int] | None] = []
    for name in (CONFIG, METRICS, SUMMARY, ACCOUNT):
        try:
            status = (folder / name).stat()
            stamps.append((status.st_mtime_ns, status.st_size))
        except OSError:
            stamps.append(None)
    return tuple(stamps)


def _left_out(known: dict[Path, _Known], parent: Path) -> list[dict[str, Any]]:
    """Reasons with how many folders have them, the most frequent first, and the names of some."""
    counts = Counter(each.reason for each in known.values() if each.reason is not None)
    return [
        {
            "reason": reason,
            "count": count,
            "folders": [str(f.relative_to(parent)) for f, each in known.items() if each.reason == reason][:_EXAMPLES],
        }
        for reason, count in counts.most_common()
    ]


def _settings(runs: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Keys with the values they take, those that differ first, and for each run the index of its value in each.

    A key that a run does not have, as one of an expert has none in a dense model, has index -1.
    """
    values: dict[str, dict[str, int]] = {}
    for settings in runs:
        for key, value in settings.items():
            values.setdefault(key, {}).setdefault(_text(value), len(values[key]))
    alike = {key for key, taken in values.items() if len(taken) == 1 and all(key in settings for settings in runs)}
    order = sorted(values, key=lambda key: key in alike)
    indices = [[values[key][_text(settings[key])] if key in settings else -1 for key in order] for settings in runs]
    return [{"key": key, "values": list(values[key]), "differs": key not in alike} for key in order], indices


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
