"""Figures of a report in words."""

from __future__ import annotations

import math
from typing import Any

DIFFERENCE, RELATIVE = "nats a token", "log ratio"


def effect(figure: dict[str, Any]) -> str:
    if figure["effect"] is None:
        return "–"
    bound = f"{figure['bound']} " if figure["bound"] else ""
    unit = "" if figure["unit"] == RELATIVE else f" {figure['unit']}"
    return f"{bound}{number(figure['effect'], figure['unit'])}{unit}"


def interval(figure: dict[str, Any]) -> str:
    if figure["interval"] is None:
        return "–"
    if figure["interval"][0] == figure["interval"][1]:
        return "exact"  # a figure of the configuration
    low, high = (None if end is None else number(end, figure["unit"]) for end in figure["interval"])
    return f"over {low}" if high is None else f"{low} to {high}"


def number(value: float, unit: str) -> str:
    """Differences of losses with their sign; those of their logarithms as a share of the loss, in percent."""
    if unit == RELATIVE:
        return f"{100 * math.expm1(value):+.3g}%"
    if unit == DIFFERENCE:
        return f"{value:+.3g}"
    return f"{value:.4f}" if 0 < abs(value - 1) < 0.005 else f"{value:.3g}"  # on which side of 1 it is


def deciding(claim: dict[str, Any]) -> list[dict[str, Any]]:
    """The comparisons a verdict rests on."""
    return [each for each in claim["comparisons"] if each["decides"]]


def dollars(usd: float | None) -> str:
    return "no price" if usd is None else f"${usd:.2g}" if usd < 1 else f"${usd:,.2f}"


def device_of(device: dict[str, Any]) -> str:
    threads = device["num_threads"]
    cores = f", {threads} thread{'' if threads == 1 else 's'}" if device["hardware"] == "cpu" else ""
    return f"{device['device_name']}{cores}, {device['compute_dtype']}"


def seeds_made_again(claim: dict[str, Any], word: str = "") -> str:
    """Which they are, in brackets, where they do not begin with 0: of a suite made again."""
    first = claim.get("first_seed", 0)
    return f" ({word}{first} to {first + claim['seeds'] - 1})" if first else ""


def word(verdict: str, scale: str) -> str:
    """Of a comparison, for a reader: at scale=smoke its figures decide nothing, whatever would follow from them."""
    return "not decided" if scale == "smoke" else verdict
