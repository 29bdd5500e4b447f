"""`report.json`, `REPORT.md` and `report.html` of a suite: the same content, every figure with the runs it is from.

The JSON is the record, the other two are made from it alone. A claim that is put to the test again replaces its entry.
A report may be far from its runs when it is read again, for a README say. So every entry has a `digest` of itself, by
which a figure or curve that was changed is noticed, and its verdict must follow from its p values, the digest left out
or not. Both are against mistakes: who forges all of it is found out by making the runs again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any, get_args

from moe_train.claims import html, markdown
from moe_train.claims.axes import fits
from moe_train.claims.loss_curves import curves_of
from moe_train.claims.plan import Plan
from moe_train.claims.registered import file_of
from moe_train.claims.results import Folder, Result
from moe_train.claims.statistics import holm
from moe_train.claims.verdict import Judged, Verdict, verdict_by, verdict_of
from moe_train.cli import write_json, write_whole
from moe_train.errors import UserError

Content = dict[str, Any]

JSON, MARKDOWN, HTML = "report.json", "REPORT.md", "report.html"
_OF_DEVICE = ("device_name", "hardware", "num_devices", "num_threads", "compute_dtype", "price_usd_per_hour")
# What is read of an entry again: by the README's table, and where claims are judged together.
_READ = {
    *("claim", "scale", "number", "verdict", "comparisons", "published", "seeds", "runs", "planned_runs", "usd"),
    *("device", "notes", "reasons", "run_list", "p_supported"),
}
_OF_DATA = ("price_source", "price_date", "corpus", "corpus_fingerprint", "versions")


def write(judged: Sequence[Judged], folder: Folder) -> Content:
    """The JSON and the Markdown in the suite's folder; returns what the JSON holds."""
    path = folder.path / JSON
    content = merged(read_if_there(folder), [entry(each, folder) for each in judged])
    write_json(path, content)
    write_whole(folder.path / MARKDOWN, markdown.report(content))
    return content


def read_if_there(folder: Folder) -> Content | None:
    """The report so far. Raises UserError where something else is in its place."""
    path = folder.path / JSON
    return read(path, "out=") if path.exists() else None


def write_page(folder: Folder) -> None:
    """report.html from the JSON, once: drawing takes a second a claim."""
    if (folder.path / JSON).exists():
        write_whole(folder.path / HTML, html.report(read(folder.path / JSON)))


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
            if odd is None and not _is_as_written(claim):
                odd = f"claim={claim['claim']} scale={claim['scale']}"
    except FileNotFoundError:
        raise UserError(f"there is no report {path}: run scripts/reproduce.py claim=NAME first") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no report of claims: move it away, or give another {other}") from None
    if odd is not None:
        raise UserError(
            f"{path}: {odd} is not as it was written: put the file back, or move it away and judge its claims again "
            f"where their runs are, or give another {other}"
        )
    return content


def _adds_up(content: Content) -> bool:
    runs, usd = _all_runs(content["claims"])
    said = content["usd_of_distinct_runs"]
    same = usd == said or (usd is not None and said is not None and math.isclose(usd, said))
    return same and runs == content["distinct_runs"]


def _digest(claim: dict[str, Any]) -> str:
    """Of an entry, but for what the other claims of its report decide."""
    own = {key: value for key, value in claim.items() if key not in ("digest", "p_supported_over_all_claims")}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


def _is_as_written(claim: dict[str, Any]) -> bool:
    """An earlier version wrote no digest; that verdicts follow from p values holds of all."""
    comparisons = claim["comparisons"]
    for each in comparisons:
        alpha = 0.0 if each["level"] is None else round((1 - each["level"]) / 2, 12)
        if each["verdict"] != verdict_by(each["p_supported"], each["p_refuted"], alpha):
            return False
    deciding = [each["verdict"] for each in comparisons if each["decides"]]
    follows: bool = claim["verdict"] == verdict_of(claim["scale"], deciding)
    return follows and claim.get("digest", _digest(claim)) == _digest(claim)


def merged(earlier: Content | None, entries: Sequence[dict[str, Any]]) -> Content:
    """Earlier claims that are not among the new ones stay. Holm's adjustment over a scale's claims is made anew."""
    new = {(each["claim"], each["scale"]) for each in entries}
    kept = [each for each in (earlier or {}).get("claims", []) if (each["claim"], each["scale"]) not in new]
    claims = sorted([*kept, *entries], key=lambda each: (each["scale"], each["number"] or 10**6, each["claim"]))
    for scale in dict.fromkeys(each["scale"] for each in claims):
        family = [each for each in claims if each["scale"] == scale]
        adjusted = holm([1.0 if each["p_supported"] is None else each["p_supported"] for each in family])
        for each, p in zip(family, adjusted):
            each["p_supported_over_all_claims"] = None if each["p_supported"] is None else float(p)
    runs, usd = _all_runs(claims)
    return {"date": date.today().isoformat(), "claims": claims, "distinct_runs": runs, "usd_of_distinct_runs": usd}


def _all_runs(claims: Sequence[dict[str, Any]]) -> tuple[int, float | None]:
    """How many there are, each once, and what they cost."""
    runs = {run["hash"]: run["usd"] for each in claims for run in each["run_list"]}
    return len(runs), None if any(value is None for value in runs.values()) else sum(runs.values())


def entry(judged: Judged, folder: Folder) -> dict[str, Any]:
    """A claim as it stands in the JSON."""
    content = _content(judged, folder)
    return {**content, "digest": _digest(content)}


def _content(judged: Judged, folder: Folder) -> dict[str, Any]:
    plan, config = judged.plan, judged.plan.claim.config
    main = judged.main
    results = [*judged.tuning, *judged.results]
    registered = file_of(plan, folder)
    return {
        "claim": plan.claim.name,
        "number": config.number,
        "scale": plan.scale_name,
        "verdict": judged.verdict,
        "effect": main.effect,
        "interval": None if main.interval is None else list(main.interval),
        "unit": main.unit,
        "level": main.level,
        "bound": main.bound,
        "p_supported": judged.p_supported,
        "runs": judged.made,
        "planned_runs": judged.planned,
        "usd": judged.usd,
        "usd_tuning": judged.usd_tuning,
        "statement": config.statement,
        "source": config.source,
        "published": config.published,
        "carries_over": config.carries_over,
        "does_not_carry_over": config.does_not_carry_over,
        "registered": json.loads(registered.read_text())["date"] if registered.exists() else None,
        "protocol": str(registered.relative_to(folder.path)),
        "seeds": plan.scale.seeds,
        "first_seed": plan.scale.first_seed,
        "budgets": list(plan.scale.tokens),
        "learning_rates": judged.rates,
        "reasons": judged.reasons,
        "notes": judged.notes,
        "comparisons": [asdict(compared) for compared in judged.comparisons],
        "axes": [asdict(saved) for saved in judged.axes],
        "arms": {name: _arm(plan, name) for name in plan.arms},
        "common": [*config.base, *plan.scale.overrides, *plan.given],
        "tuning": None if plan.scale.tuning is None else asdict(plan.scale.tuning),
        "fits": fits(plan, judged.results) if not judged.reasons else [],
        "device": _common(results),
        "run_list": [_run(result, folder) for result in results],
        "curves": curves_of(judged.results, len(plan.scale.tokens) - 1),
    }


def _arm(plan: Plan, name: str) -> dict[str, Any]:
    settings = plan.claim.config.arms[name]
    return {
        "overrides": [*settings.overrides, *(plan.scale.arms or {}).get(name, ())],
        "starts_from": settings.starts_from,
        "flops_of": settings.flops_of,
        **plan.arms[name].figures,
    }


def _common(results: Sequence[Result]) -> dict[str, Any]:
    """Of the last run; that all are alike was checked."""
    return {key: results[-1].summary.get(key) for key in (*_OF_DEVICE, *_OF_DATA)} if results else {}


def _run(result: Result, folder: Folder) -> dict[str, Any]:
    run, summary = result.run, result.summary
    return {
        "hash": run.hash,
        "folder": str(result.folder.relative_to(folder.path)),
        "arm": run.arm,
        "seed": run.seed,
        "purpose": run.purpose,
        "learning_rate": run.rate,
        "tokens": summary["tokens"],
        "flops": summary["tokens"] * summary["flops_per_token"],
        "val_loss": summary["val_loss"],
        "val_bits_per_byte": summary["val_bits_per_byte"],
        "train_seconds": summary["train_seconds"],
        "usd_train": summary["usd_train"],
        "usd": folder.spent(run),
        "max_violation": summary["final_max_violation"],
        "neighbours": result.neighbours,
    }
