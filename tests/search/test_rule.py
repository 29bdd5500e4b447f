"""The rule is found where there is one, and says where it cannot be trusted."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_train.search.points import Point
from moe_train.search.rule import Best, best_of, fit
from moe_train.search.tables import rule_lines


def study(size: float, rates: list[float], best: float, noise: float = 0.0) -> list[Point]:
    """Losses that are a parabola over the logarithm of the rate."""
    random = np.random.default_rng(int(size))
    return [
        Point(
            {"width": "w"},
            {"optimizer.lr": rate},
            (1 + 0.2 * math.log(rate / best) ** 2 + noise * random.normal(),),
            None,
            {"active_params": size},
            ("hash",),
        )
        for rate in rates
    ]


RATES = list(np.geomspace(1e-3, 1e-1, 12))


@pytest.mark.parametrize(("noise", "within"), [(0.0, 1e-6), (0.01, 0.1)])
def test_a_planted_rule_is_found(noise: float, within: float) -> None:
    sizes = (1e5, 1e6, 1e7, 3e7)
    studies = [study(size, RATES, 0.02 * (size / 1e6) ** -0.3, noise) for size in sizes]
    bests = [best for points in studies if (best := best_of(points, "active_params", "optimizer.lr"))]
    assert {best.how for best in bests} == {"parabola"}
    rule = fit(bests)
    assert rule is not None
    assert rule.a == pytest.approx(-0.3, abs=within)
    assert rule.c * 1e6**rule.a == pytest.approx(0.02, rel=0.1 if noise else 1e-6)
    assert rule.standard_error is not None
    assert rule.standard_error <= within


def test_a_best_at_the_edge_of_what_was_tried_is_said() -> None:
    best = best_of(study(1e6, RATES, 10.0), "active_params", "optimizer.lr")
    assert best is not None
    assert (best.y, best.how) == (pytest.approx(0.1), "edge")


def test_few_trials_have_a_best_one_and_no_parabola() -> None:
    best = best_of(study(1e6, [0.001, 0.01, 0.1], 0.02), "active_params", "optimizer.lr")
    assert best is not None
    assert (best.y, best.how) == (0.01, "best trial")
    assert best_of([], "active_params", "optimizer.lr") is None
    assert best_of(study(1e6, RATES, 0.02), "no such figure", "optimizer.lr") is None


def test_two_studies_make_a_line_and_one_makes_none() -> None:
    one, two = Best({}, 1e6, 0.02, "edge"), Best({}, 1e7, 0.01, "parabola")
    rule = fit([one, two])
    assert rule is not None
    assert rule.standard_error is None
    assert fit([one, one]) is None
    content = {"x": "active_params", "y": "optimizer.lr", "bests": [vars(one)], "c": None, "a": None}
    assert rule_lines(content)[-1] == "no rule yet: it takes two studies with runs at different active_params"
