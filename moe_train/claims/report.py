"""`report.json`, `REPORT.md` and `report.html` of a suite: the same content, every figure with the runs it is from.

The JSON is the record (record.py reads it again), the other two are made from it alone. A claim that is put to the test
again replaces its entry.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from typing import Any

from moe_train.claims import html, markdown
from moe_train.claims.axes import fits
from moe_train.claims.loss_curves import curves_of
from moe_train.claims.plan import Plan
from moe_train.claims.record import JSON, Content, all_runs, digest, read
from moe_train.claims.registered import file_of
from moe_train.claims.results import Folder, Result
from moe_train.claims.statistics import holm
from moe_train.claims.verdict import Judged
from moe_train.cli import write_json, write_whole

MARKDOWN, HTML = "REPORT.md", "report.html"
_OF_DEVICE = ("device_name", "hardware", "num_devices", "num_threads", "compute_dtype", "price_usd_per_hour")
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
    runs, usd = all_runs(claims)
    return {"date": date.today().isoformat(), "claims": claims, "distinct_runs": runs, "usd_of_distinct_runs": usd}


def entry(judged: Judged, folder: Folder) -> dict[str, Any]:
    """A claim as it stands in the JSON."""
    content = _content(judged, folder)
    return {**content, "digest": digest(content)}


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
        "final_max_violation": summary["final_max_violation"],
        "neighbours": result.neighbours,
    }
