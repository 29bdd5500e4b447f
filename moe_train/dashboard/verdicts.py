"""Verdicts out of a report of claims, where there is one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from moe_train.claims import record
from moe_train.errors import UserError

_SHOWN = ("claim", "scale", "verdict", "effect", "unit", "interval", "runs", "usd", "statement")


def verdicts(report: Path) -> dict[str, Any]:
    """What the report says of each claim; nothing in it is computed anew."""
    if not report.exists():
        return {"claims": [], "note": f"no claim was put to the test here: there is no {report.name}"}
    try:
        content = record.read(report, "claims=")
    except UserError as error:
        return {"claims": [], "note": f"no verdicts: {error}"}
    return {"claims": [{key: _finite(claim.get(key)) for key in _SHOWN} for claim in content["claims"]], "note": None}


def _finite(value: Any) -> Any:
    """What JSON has no word for, though Python writes and reads it, is not known."""
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
