"""Cost to target: curves recovered, inverted inside the budgets only, with intervals that follow the seeds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.claims.curves import cost_of, fit, saving

BUDGETS = np.array([0.3, 0.5, 0.7, 1.0]) * 1e6


def losses(limit: float, factor: float, exponent: float, faster: float = 1.0, seeds: int = 3) -> np.ndarray:
    curve = limit + factor * (BUDGETS * faster / 1e6) ** -exponent
    return np.tile(curve, (seeds, 1))


@settings(deadline=None, max_examples=30)
@given(limit=st.floats(0.5, 3), factor=st.floats(0.2, 3), exponent=st.floats(0.1, 1.0))
def test_a_curve_without_noise_is_recovered(limit: float, factor: float, exponent: float) -> None:
    loss = losses(limit, factor, exponent, seeds=1)
    curve = fit(BUDGETS, loss)
    fitted = curve.limit + curve.factor * BUDGETS**-curve.exponent
    assert fitted == pytest.approx(loss[0], rel=1e-2)  # the grid of exponents has steps of 11%
    middle = limit + factor * 0.6**-exponent
    cost, side = cost_of(curve, np.array([middle]), BUDGETS)
    assert cost[0] == pytest.approx(0.6e6, rel=0.02)
    assert side[0] == 0


@settings(deadline=None, max_examples=30)
@given(ratio=st.floats(1.05, 3.0))
def test_a_saving_within_the_budgets_is_found(ratio: float) -> None:
    found = saving(BUDGETS, losses(1.2, 0.9, 0.4, ratio), BUDGETS, losses(1.2, 0.9, 0.4), draws=100)
    assert found.ratio == pytest.approx(ratio, rel=0.03)
    assert found.bound is None


@pytest.mark.parametrize(("faster", "bound", "ratio"), [(10.0, "at least", 1 / 0.3), (0.5, "at most", 1.0)])
def test_nothing_is_extrapolated(faster: float, bound: str, ratio: float) -> None:
    found = saving(BUDGETS, losses(1.2, 0.9, 0.4, faster), BUDGETS, losses(1.2, 0.9, 0.4), draws=100)
    assert (found.bound, found.ratio) == (bound, pytest.approx(ratio))


def test_what_is_no_number_shows_nothing() -> None:
    prices = np.full(3, np.nan)
    found = saving(BUDGETS, losses(1.2, 0.9, 0.4, 2.0), BUDGETS, losses(1.2, 0.9, 0.4), prices, draws=100)
    assert found.p_values(1.0) == (1.0, 1.0)


def test_a_curve_that_does_not_fall_reaches_nothing() -> None:
    rising = losses(1.2, 0.9, 0.4)[:, ::-1]
    found = saving(BUDGETS, rising, BUDGETS, losses(1.2, 0.9, 0.4), draws=100)
    assert (found.bound, found.ratio) == ("at most", 1.0)


def test_what_seeds_have_in_common_does_not_widen_the_interval() -> None:
    common = np.random.default_rng(0).normal(0, 0.05, (4, 1))
    ours, theirs = losses(1.2, 0.9, 0.4, 1.6, 4) + common, losses(1.2, 0.9, 0.4, 1.0, 4) + common
    own = np.random.default_rng(1).normal(0, 0.05, (4, 1))
    together, apart = (saving(BUDGETS, x, BUDGETS, theirs).interval(0.9) for x in (ours, ours + own))
    assert together[1] - together[0] < 0.1 * (apart[1] - apart[0])


def test_a_dearer_token_takes_from_the_saving() -> None:
    prices = np.log([0.5, 0.52, 0.48])  # a token of the arm costs twice as much
    found = saving(BUDGETS, losses(1.2, 0.9, 0.4, 1.6), BUDGETS, losses(1.2, 0.9, 0.4), prices)
    assert found.ratio == pytest.approx(0.8, rel=0.05)
    assert found.interval(0.9)[1] < 1
    assert found.p_values(1.0)[1] < 0.05


def test_a_cheaper_token_is_no_saving_where_the_target_was_never_reached() -> None:
    prices = np.log([1.3, 1.31, 1.29])  # a token of the arm is cheaper
    noise = np.random.default_rng(0).normal(0, 0.001, (3, 4))
    found = saving(BUDGETS, losses(1.2, 0.9, 0.4, 0.5) + noise, BUDGETS, losses(1.2, 0.9, 0.4), prices)
    assert (found.bound, found.ratio) == ("at most", pytest.approx(1.3, rel=0.01))
    assert found.p_values(1.0)[0] > 0.9
    assert found.interval(0.9)[0] == 0
    assert found.p_values(1.5)[1] < 0.05  # but a larger one is refuted
    quick = saving(BUDGETS, losses(1.2, 0.9, 0.4, 10.0) + noise, BUDGETS, losses(1.2, 0.9, 0.4))
    assert quick.interval(0.9)[1] is None
    assert quick.p_values(5.0)[1] > 0.9
