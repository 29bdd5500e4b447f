"""Which limit ends a run, and that a run never goes more than its last step beyond it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.config import StopConfig
from moe_train.errors import UserError
from moe_train.training.limits import Limits, Spent

USD_PER_SECOND = 2.0 / 3600


def stop(**limits) -> StopConfig:
    names = ("steps", "tokens", "flops", "seconds", "usd")
    return StopConfig(**{name: limits.get(name) for name in names}, default_tokens=limits.get("default_tokens", 1000))


def after(steps: int, seconds_a_step: float = 1.0, reserve_seconds: float = 0.0) -> Spent:
    """What a run has spent that takes 10 tokens and 1e6 FLOPs a step."""
    seconds = steps * seconds_a_step
    return Spent(
        steps,
        10 * steps,
        1e6 * steps,
        seconds,
        seconds * USD_PER_SECOND,
        reserve_seconds,
        reserve_seconds * USD_PER_SECOND,
    )


limits_given = st.fixed_dictionaries(
    {},
    optional={
        "steps": st.integers(1, 200),
        "tokens": st.integers(1, 2000),
        "flops": st.floats(1e5, 2e8),
        "seconds": st.floats(1, 300),
        "usd": st.floats(0.001, 0.2),
        "budget": st.floats(0.001, 0.2),
    },
)


@settings(deadline=None)
@given(limits_given, st.floats(0.01, 10), st.floats(0, 20))
def test_progress_never_falls_and_the_run_ends_within_one_step_of_the_first_limit(given, seconds_a_step, reserve):
    config = stop(**given)
    limits = Limits(config, given.get("budget"), True)
    step, progress = 0, [limits.progress(after(0, seconds_a_step, reserve))]
    while progress[-1] < 1:
        step += 1
        progress.append(limits.progress(after(step, seconds_a_step, reserve)))
    assert progress == sorted(progress)

    def within(spent: Spent, reserve: float) -> list[bool]:
        """Written out from the definition of each limit, to compare with."""
        return [
            config.steps is None or spent.steps < config.steps,
            config.tokens is None or spent.tokens < config.tokens,
            config.flops is None or spent.flops < config.flops,
            config.seconds is None or spent.seconds + reserve < config.seconds,
            config.usd is None or spent.usd + reserve * USD_PER_SECOND < config.usd,
            "budget" not in given or spent.usd + reserve * USD_PER_SECOND < given["budget"],
            bool(given.keys() - {"budget"}) or spent.tokens < config.default_tokens,
        ]

    # A hair's breadth of tolerance: sums of floats may round to either side of a limit.
    if step > 0:
        assert all(within(after(step - 1, seconds_a_step * (1 - 1e-9)), reserve * (1 - 1e-9)))
    assert not all(within(after(step, seconds_a_step * (1 + 1e-9)), reserve * (1 + 1e-9)))


def test_the_first_limit_reached_is_named_as_the_user_gave_it():
    limits = Limits(stop(steps=1000, tokens=500, seconds=3600.0), None, False)
    assert limits.reason(after(49)) is None
    assert limits.progress(after(49)) == pytest.approx(0.98)
    assert limits.reason(after(50)) == "stop.tokens=500"


def test_the_default_counts_only_where_no_limit_is_given():
    assert Limits(stop(default_tokens=100), None, False).reason(after(10)) == "stop.default_tokens=100"
    assert Limits(stop(default_tokens=100, steps=50), None, False).reason(after(49)) is None


def test_time_for_the_closing_evaluation_is_kept_back_from_seconds_and_dollars_but_not_from_counts():
    by_time = Limits(stop(seconds=100.0), None, False)
    assert by_time.progress(after(0, reserve_seconds=20)) == 0
    assert by_time.progress(after(40, reserve_seconds=20)) == pytest.approx(0.5)
    assert by_time.reason(after(80, reserve_seconds=20)) == "stop.seconds=100.0"
    by_money = Limits(stop(usd=100 * USD_PER_SECOND), None, True)
    assert by_money.progress(after(40, reserve_seconds=20)) == pytest.approx(0.5)
    assert Limits(stop(steps=100), None, False).progress(after(40, reserve_seconds=20)) == pytest.approx(0.4)


def test_a_reserve_that_leaves_nothing_ends_the_run_at_once():
    assert Limits(stop(seconds=10.0), None, False).progress(after(0, reserve_seconds=10)) == 1


@pytest.mark.parametrize(("usd", "budget", "key"), [(1.0, None, "stop"), (None, 1.0, "budget"), (1.0, 2.0, "stop")])
def test_dollars_without_a_price_are_refused_with_the_remedy(usd, budget, key):
    with pytest.raises(UserError, match=rf"{key}\.usd=1 needs a price.*hardware\.price_usd_per_hour"):
        Limits(stop(usd=usd), budget, False)


def test_the_default_end_holds_beside_a_budget_and_either_can_come_first():
    limits = Limits(stop(default_tokens=100), 5 * USD_PER_SECOND, True)
    assert limits.reason(after(4)) is None
    assert limits.reason(after(5)) == f"budget.usd={5 * USD_PER_SECOND:,}"
    assert limits.uses_clock
    assert Limits(stop(default_tokens=100), 50 * USD_PER_SECOND, True).reason(after(10)) == "stop.default_tokens=100"


def test_seconds_left_are_those_to_the_nearest_limit_less_the_reserve():
    limits = Limits(stop(seconds=100.0, usd=80 * USD_PER_SECOND), 200 * USD_PER_SECOND, True)
    assert limits.seconds_left(after(30, reserve_seconds=10), USD_PER_SECOND) == pytest.approx(40)
    assert Limits(stop(seconds=20.0), None, False).seconds_left(after(30), 0.0) == pytest.approx(-10)
    assert Limits(stop(steps=5), None, True).seconds_left(after(30), USD_PER_SECOND) == float("inf")


def test_only_time_and_money_need_the_ranks_to_agree():
    assert Limits(stop(seconds=1.0), None, False).uses_clock
    assert Limits(stop(usd=1.0), None, True).uses_clock
    assert not Limits(stop(steps=1, tokens=1, flops=1.0), None, False).uses_clock
    assert not Limits(stop(), None, False).uses_clock
