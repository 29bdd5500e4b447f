"""The word that p values lead to. Nothing else decides it, neither when it is written nor when it is read again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Verdict = Literal["supported", "refuted", "inconclusive"]


def verdict_by(p_supported: float | None, p_refuted: float | None, alpha: float) -> Verdict:
    """Of a comparison, from its adjusted p values; None: it was not computed."""
    if p_supported is not None and p_supported <= alpha:
        return "supported"
    return "refuted" if p_refuted is not None and p_refuted <= alpha else "inconclusive"


def verdict_of(scale: str, deciding: Sequence[Verdict]) -> Verdict:
    """Of a claim, from those of the comparisons that decide; at scale=smoke none, whatever they say."""
    if scale == "smoke":
        return "inconclusive"
    if all(each == "supported" for each in deciding):
        return "supported"
    return "refuted" if "refuted" in deciding else "inconclusive"
