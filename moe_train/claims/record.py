"""The JSON of a report: read again, and held to what it says of itself.

A report may be far from its runs when it is read, for a README or a dashboard say. So every entry has a `digest` of
itself, by which a figure or curve that was changed is noticed, and its verdict must follow from its p values, the
digest left out or not. Both are against mistakes: who forges all of it is found out by making the runs again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from moe_train.claims.rules import Verdict, verdict_by, verdict_of
from moe_train.errors import UserError

Content = dict[str, Any]

JSON = "report.json"
_DIGESTS_SINCE = "2026-11-27"  # every report of a later date has them
# What is read of an entry again: by the README's table, the dashboard, and where claims are judged together.
_READ = {
    *("claim", "scale", "number", "verdict", "comparisons", "published", "seeds", "runs", "planned_runs", "usd"),
    *("device", "notes", "reasons", "run_list", "p_supported"),
}


def read(path: Path, other: str = "report=") -> Content:
    """Raises UserError where it is no report, or not a whole one. `other`: the setting that would name another."""
    try:
        content: Content = json.loads(path.read_text())
        odd = "what is said of all claims together" if content["date"] and not _adds_up(content) else None
        for claim in content["claims"]:
            if missing := _READ.difference(claim):
                raise KeyError(*missing)
            if claim["verdict"] not in get_args(Verdict):
                raise ValueError(claim["verdict"])
            if odd is None and not _is_as_written(claim, content["date"] > _DIGESTS_SINCE):
                odd = f"claim={claim['claim']} scale={claim['scale']}"
    except FileNotFoundError:
        raise UserError(f"there is no report {path}: run scripts/reproduce.py claim=NAME first") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        remedy = f"move it away, or give another {other} (a suite's {JSON} is one, what json= wrote is none)"
        raise UserError(f"{path} is no report of claims: {remedy}") from None
    if odd is not None:
        raise UserError(
            f"{path}: {odd} is not as it was written: put the file back, or move it away and judge its claims again "
            f"where their runs are, or give another {other}"
        )
    return content


def refuse_twice(contents: Mapping[str, Content]) -> None:
    """Raises UserError where two of the reports, by their names, hold the same suite: it would count twice."""
    seen: dict[tuple[Any, ...], str] = {}
    for name, content in contents.items():
        for claim in content["claims"]:
            runs = tuple(sorted(run["hash"] for run in claim["run_list"]))
            suite = (claim["claim"], claim["scale"], claim.get("registered"), runs)
            if runs and seen.setdefault(suite, name) != name:
                raise UserError(
                    f"{seen[suite]} and {name} hold the same suite of claim={claim['claim']} scale={claim['scale']}: "
                    "name one of them in report="
                )


def _adds_up(content: Content) -> bool:
    runs, usd = all_runs(content["claims"])
    said = content["usd_of_distinct_runs"]
    same = usd == said or (usd is not None and said is not None and math.isclose(usd, said))
    return same and runs == content["distinct_runs"]


def digest(claim: dict[str, Any]) -> str:
    """Of an entry, but for what the other claims of its report decide."""
    own = {key: value for key, value in claim.items() if key not in ("digest", "p_supported_over_all_claims")}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


def _is_as_written(claim: dict[str, Any], has_digest: bool) -> bool:
    """An earlier version wrote no digest; that verdicts follow from p values holds of all."""
    if has_digest and "digest" not in claim:
        return False
    comparisons = claim["comparisons"]
    for each in comparisons:
        alpha = 0.0 if each["level"] is None else round((1 - each["level"]) / 2, 12)
        undecided = claim["scale"] == "smoke" and each["verdict"] == "inconclusive"
        if not undecided and each["verdict"] != verdict_by(each["p_supported"], each["p_refuted"], alpha):
            return False
    deciding = [each["verdict"] for each in comparisons if each["decides"]]
    follows: bool = claim["verdict"] == verdict_of(claim["scale"], deciding)
    return follows and claim.get("digest", digest(claim)) == digest(claim)


def all_runs(claims: Sequence[dict[str, Any]]) -> tuple[int, float | None]:
    """How many there are, each once, and what they cost."""
    runs = {run["hash"]: run["usd"] for each in claims for run in each["run_list"]}
    return len(runs), None if any(value is None for value in runs.values()) else sum(runs.values())
