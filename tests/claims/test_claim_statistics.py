"""The tests against scipy's and known values, and what they promise over thousands of simulated suites."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moe_train.claims import self_check
from moe_train.claims.statistics import Mean, binomial_interval, detectable, holm, p_values, power, seeds_needed

RANDOM = np.random.default_rng(5)
A, B = RANDOM.normal(2.0, 0.02, 6), RANDOM.normal(1.99, 0.01, 6)


def test_paired_and_unpaired_p_values_are_those_of_scipy() -> None:
    paired, welch = Mean.of(A - B), Mean.of_difference(A, B)
    assert paired.p_difference() == pytest.approx(stats.ttest_rel(A, B).pvalue)
    assert paired.p_below(0.0) == pytest.approx(stats.ttest_rel(A, B, alternative="less").pvalue)
    assert welch.p_difference() == pytest.approx(stats.ttest_ind(A, B, equal_var=False).pvalue)
    low, high = welch.interval(0.9)
    expected = stats.ttest_ind(A, B, equal_var=False).confidence_interval(0.9)
    assert (low, high) == pytest.approx((expected.low, expected.high))


def test_what_each_kind_asks_of_a_mean() -> None:
    mean = Mean.of(A - B)
    shifted = {margin: stats.ttest_1samp(A - B, margin, alternative="less").pvalue for margin in (-0.01, 0.01)}
    assert p_values(mean, "superiority", 0.01) == pytest.approx((shifted[-0.01], 1 - shifted[-0.01]))
    assert p_values(mean, "non_inferiority", 0.01) == pytest.approx((shifted[0.01], 1 - shifted[0.01]))
    assert p_values(mean, "tost", 0.01)[0] == pytest.approx(max(shifted[0.01], 1 - shifted[-0.01]))
    own = Mean.of(A)
    assert p_values(own, "below", 2.0)[0] == pytest.approx(stats.ttest_1samp(A, 2.0, alternative="less").pvalue)
    assert p_values(Mean.of(np.log([2.0, 2.2, 2.1])), "ratio_above", 1.5)[0] < 0.05


def test_figures_without_scatter_are_facts() -> None:
    saved = Mean.of([-4.0, -4.0])
    assert p_values(saved, "superiority", 3.9) == (0.0, 1.0)
    assert p_values(saved, "superiority", 4.1) == (1.0, 0.0)
    assert Mean.of([0.0, 0.0]).p_difference() == 1.0


def test_holm_of_a_known_family() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.randoms())
def test_holm_never_lowers_a_p_value_and_does_not_care_for_their_order(p: list[float], random: object) -> None:
    adjusted = holm(p)
    assert (adjusted >= np.array(p)).all()
    assert (adjusted <= np.minimum(1, len(p) * np.array(p)) + 1e-12).all()
    order = np.random.default_rng(len(p)).permutation(len(p))
    assert holm(np.array(p)[order]) == pytest.approx(adjusted[order])


def test_power_of_one_test_is_that_of_its_noncentral_t() -> None:
    # One sample, one-sided, d = 0.5: the smallest n with 80% power is 27, which has 0.8118 (G*Power's example).
    assert power("above", 0.0, 0.5, 1.0, 27, 0.05) == pytest.approx(0.8118, abs=1e-4)
    assert power("above", 0.0, detectable(0.3, 4, 0.05), 0.3, 4, 0.05) == pytest.approx(0.8, abs=1e-6)
    assert power("tost", 0.01, 0.0, 0.1, 3, 0.05) < 0.01


def test_seeds_needed_are_the_fewest_that_show_it() -> None:
    needed = seeds_needed("tost", 0.01, 0.015, 0.05)
    assert needed is not None
    assert power("tost", 0.01, 0.0, 0.015, needed, 0.05) >= 0.8
    assert power("tost", 0.01, 0.0, 0.015, needed - 1, 0.05) < 0.8
    assert seeds_needed("tost", 0.01, 1.0, 0.05) is None  # more than a thousand
    # The rule of thumb of the protocol, 16 (sigma / margin)^2, is of one side and a normal distribution.
    assert needed == pytest.approx(16 * (0.015 / 0.01) ** 2, rel=0.5)


def test_the_binomial_interval_is_exact() -> None:
    assert binomial_interval(0, 10, 0.95) == pytest.approx((0, 0.3085), abs=1e-4)


def test_simulated_suites_keep_what_is_promised() -> None:
    """Those of curves take longest: the README's self_check=true is run by its tests."""
    assert min(self_check.SUITES, self_check.CURVE_SUITES) >= 1000
    checks = [*self_check.false_positives(), *self_check.planted_effects()]
    assert any("Holm" in check.what for check in checks)
    for check in checks:
        assert check.passed, check


def test_planted_bugs_are_caught() -> None:
    checks = self_check.planted_bugs()
    assert len(checks) == 6
    for check in checks:
        assert check.passed, check


def test_real_losses_are_dealt_to_two_arms_in_all_ways() -> None:
    rate, ways = self_check.share_of_deals_that_differ(RANDOM.normal(2, 0.01, 8).tolist())
    assert ways == 70
    assert rate <= 0.1
    assert self_check.share_of_deals_that_differ([1.0, 1.001, 1.002, 2.0, 2.001, 2.002])[0] > 0.05
