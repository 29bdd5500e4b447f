"""The claims' page stays small however many runs a claim has."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from moe_train.claims import figures
from moe_train.claims.loss_curves import POINTS


@pytest.fixture
def claim() -> dict[str, Any]:
    """Three arms with as many points as a curve has, however many runs it is the mean of."""
    x = np.arange(1, POINTS + 1) * 8192.0
    noise = np.random.default_rng(0).normal(scale=0.05, size=(3, POINTS))
    curves = {}
    for arm, each in zip(("two", "three", "four"), noise):
        mean = 2 + 3 / np.arange(1, POINTS + 1) + each
        band = {"mean": mean.tolist(), "low": (mean - 0.1).tolist(), "high": (mean + 0.1).tolist()}
        axes = dict(zip(("tokens", "flops", "seconds", "usd"), (x.tolist(), (x * 6e6).tolist(), None, None)))
        curves[arm] = {**axes, "loss": band, "load": band}
    return {"claim": "mine", "scale": "cpu", "curves": curves, "axes": []}


def test_coordinates_are_given_to_a_tenth_of_a_point(claim: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = figures.svg(claim)
    monkeypatch.setattr(figures, "_to_a_tenth", lambda number: number[0])
    exact = figures.svg(claim)

    def numbers(picture: str) -> list[str]:
        return re.findall(r"-?\d+(?:\.\d+)?", " ".join(re.findall(r' d="([^"]+)"', picture)))

    assert not [number for number in numbers(drawn) if len(number.partition(".")[2]) > 1]
    np.testing.assert_allclose(np.array(numbers(drawn), float), np.array(numbers(exact), float), rtol=0, atol=0.0501)
    assert len(drawn) < 0.75 * len(exact)
    assert "Bitstream" not in drawn  # a list of fonts beside every tick


def test_seconds_and_dollars_that_are_not_compared_are_not_drawn_beside_each_other(claim: dict[str, Any]) -> None:
    for curve in claim["curves"].values():
        curve |= {"seconds": curve["tokens"], "usd": curve["tokens"]}
    for timed in (True, False):
        saved = {"ratio": 1.1, "low": 1.0, "high": 1.2, "bound": None} if timed else None
        picture = figures.svg(claim | {"axes": [{"axes": {"seconds": saved, "usd": saved}}]})
        assert ("seconds of training" in picture, "dollars of training" in picture) == (timed, timed)
        assert "FLOPs" in picture
