"""Verdicts out of a report of claims, where there is one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

_SHOWN = ("claim", "scale", "verdict", "effect", "unit", "interval", "runs", "usd", "statement")


def verdicts(report: Path) -> dict[str, Any]:
    """What the report says of each claim; nothing in it is computed anew."""
    try:
        content = json.loads(report.read_text(encoding="utf-8"))
        judged = [claim for claim in content["claims"] if claim["claim"] and claim["verdict"]]
        claims = [{key: _finite(claim.get(key)) for key in _SHOWN} for claim in judged]
    except FileNotFoundError:
        return {"claims": [], "note": f"no claim was put to the test here: there is no {report.name}"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {"claims": [], "note": f"{report.name} is no report of claims and is left out"}
    left_out = len(content["claims"]) - len(claims)
    return {"claims": claims, "note": f"{left_out} claims have no verdict yet" if left_out else None}


def _finite(value: Any) -> Any:
    """What JSON has no word for, though Python writes and reads it, is not known."""
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
