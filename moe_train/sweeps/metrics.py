"""What a run has logged so far, read while it goes on, and how far it has come by that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_train.config import StopConfig
from moe_train.training.limits import Limits, Spent

Row = dict[str, Any]


class MetricsTail:
    """Follows a metrics.jsonl that may not be there yet, and that a resumed run cuts back to its checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.last: Row | None = None

    def new_rows(self) -> list[Row]:
        """Whole rows since the last call; from the first one again where the file has become shorter."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._offset:
                    self._offset, self.last = 0, None
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        rows = [row for line in whole.splitlines() if (row := _row(line)) is not None]
        self.last = rows[-1] if rows else self.last
        return rows


def _row(line: bytes) -> Row | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) and isinstance(content.get("step"), int) else None


def progress(stop: StopConfig, row: Row | None) -> float:
    """From 0 to 1: the largest used part of a limit, by the row that was logged last."""
    if row is None:
        return 0.0
    usd = row.get("cost/usd_total")
    spent = Spent(
        steps=row["step"],
        tokens=int(row.get("progress/tokens") or 0),
        flops=row.get("progress/flops") or 0.0,
        seconds=row.get("progress/seconds") or 0.0,
        usd=usd or 0.0,
    )
    return min(1.0, Limits(stop, None, priced=True).progress(spent))
