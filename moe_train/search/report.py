"""A search so far as one plain dict: what the table and the picture show and `trials.json` keeps."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_train.search import rule as rules
from moe_train.search.points import Point, front, points_of, without_result
from moe_train.search.search import Search

FIGURES = ("val_bits_per_byte", "val_loss", "usd_total", "train_seconds", "tokens", "active_params", "total_params")


def content(search: Search) -> dict[str, Any]:
    """`usd_spent` is what the search itself has paid, for failed and given-up runs too; None without a ledger."""
    config = search.asked.config
    of_studies = [(study, points_of(study)) for study in search.studies]
    every = [point for _, points in of_studies for point in points]
    return {
        "sweep": search.asked.name,
        "question": " ".join(config.question.split()),
        "objectives": list(config.objectives),
        "usd_spent": search.usd_spent(),
        "runs": str(search.runs.path),
        "studies": [
            {
                "study": study.definition.name,
                "level": study.definition.level,
                "without_result": asdict(without_result(study)),
                "points": [_as_dict(point) for point in points],
            }
            for study, points in of_studies
        ],
        "front": [_as_dict(point) for point in front(every)] if len(config.objectives) > 1 else None,
        "rule": None if config.rule is None else _rule(config.rule.x, config.rule.y, [p for _, p in of_studies]),
    }


def _as_dict(point: Point) -> dict[str, Any]:
    return {
        "settings": {**point.level, **point.params},
        "values": list(point.values),
        "spread": point.spread,
        "figures": {name: point.figures.get(name) for name in FIGURES},
        "runs": list(point.runs),
    }


def _rule(x: str, y: str, of_studies: list[list[Point]]) -> dict[str, Any]:
    bests = [best for points in of_studies if (best := rules.best_of(points, x, y)) is not None]
    fitted = rules.fit(bests)
    return {
        "x": x,
        "y": y,
        "bests": [asdict(best) for best in bests],
        "c": None if fitted is None else fitted.c,
        "a": None if fitted is None else fitted.a,
        "standard_error": None if fitted is None else fitted.standard_error,
    }


def files(search: Search) -> tuple[Path, Path]:
    """Where the dict and the picture are kept."""
    out = search.asked.out
    return out / "trials.json", out / "trials.svg"
