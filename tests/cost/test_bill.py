"""Every dollar of a ledger in one column of its bill, and none in two."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.cost.attempt import Attempt
from moe_train.cost.bill import KINDS, make_bill
from moe_train.errors import UserError


def attempt(run: str, status: str = "finished", usd: float | None = 1.0, **others: object) -> Attempt:
    return Attempt(run=run, status=status, usd=usd, wall_seconds=3600.0, price_usd_per_hour=1.0, **others)


attempts_given = st.lists(
    st.builds(
        Attempt,
        run=st.sampled_from(["/a", "/b", "/c", None]),
        project=st.sampled_from(["p", "q", None]),
        sweep=st.sampled_from(["s", None]),
        purpose=st.sampled_from(["final", "tuning", "seed", None]),
        status=st.sampled_from(["finished", "failed", "killed", "interrupted", "out_of_budget", "running"]),
        basis=st.sampled_from(["rental", "owned"]),
        num_devices=st.integers(1, 8),
        wall_seconds=st.floats(0, 1e6),
        lost_seconds=st.floats(0, 1e5),
        price_usd_per_hour=st.floats(0, 10),
        usd=st.none() | st.floats(0, 1e4),
        usd_energy=st.just(0.0),
        started_at=st.sampled_from(["2026-11-24T10:00:00+00:00", "2026-11-25T10:00:00+00:00"]),
    ),
    max_size=12,
)


@given(attempts_given, st.sampled_from(["project", "sweep", "claim", "day", "run", "hardware"]))
def test_columns_and_groups_add_up_to_what_was_spent(attempts: list[Attempt], by) -> None:
    bill = make_bill(attempts, by)
    spent = sum(a.usd for a in attempts if a.usd is not None)
    assert bill.total.usd_total == pytest.approx(spent)
    assert sum(row.usd_total for row in bill.rows) == pytest.approx(spent)
    for row in [*bill.rows, bill.total]:
        assert sum(row.usd.values()) == pytest.approx(row.usd_total)
        assert row.usd_rent + row.usd_ownership + row.usd_energy == pytest.approx(row.usd_total)
        assert min(row.usd.values()) >= 0
    assert sum(row.attempts for row in bill.rows) == len(attempts)
    assert bill.total.unpriced_attempts == sum(a.usd is None for a in attempts)


def test_final_tuning_seed_and_other_runs_are_kept_apart() -> None:
    runs = [
        attempt("/final", purpose="final"),
        attempt("/lr", purpose="tuning", usd=2.0),
        attempt("/s1", purpose="seed", usd=3.0),
        attempt("/x", usd=4.0),
        attempt("/broken", "failed", purpose="tuning", usd=5.0),
    ]
    assert make_bill(runs, "project").total.usd == dict(zip(KINDS, (1.0, 2.0, 3.0, 4.0, 5.0, 0.0)))


def test_a_run_that_was_killed_and_went_on_is_for_its_purpose_but_for_what_was_done_again() -> None:
    runs = [
        attempt("/final", "killed", purpose="final", started_at="2026-01-01T00:00:00Z"),
        attempt("/final", purpose="final", lost_seconds=900.0, started_at="2026-01-02T00:00:00Z"),
    ]
    assert make_bill(runs, "project").total.usd == dict(zip(KINDS, (1.75, 0, 0, 0, 0, 0.25)))
    assert make_bill(runs[:1], "project").total.usd["unfinished"] == 1.0


def test_the_final_run_can_be_named_afterwards() -> None:
    runs = [attempt("/one", purpose="final"), attempt("/two"), attempt("/three", purpose="tuning")]
    usd = make_bill(runs, "project", final=Path("/two")).total.usd
    assert (usd["final"], usd["tuning"], usd["other"]) == (1.0, 1.0, 1.0)
    with pytest.raises(UserError, match="in no line of the ledger"):
        make_bill(runs, "project", final=Path("/four"))


def test_energy_of_owned_devices_is_no_part_of_their_ownership() -> None:
    row = make_bill([attempt("/a", basis="owned", usd=3.0, usd_energy=1.0, energy_kwh=5.0)], "project").total
    assert (row.usd_rent, row.usd_ownership, row.usd_energy, row.energy_kwh) == (0.0, 2.0, 1.0, 5.0)


def test_days_are_of_when_an_attempt_began_and_hours_of_all_devices() -> None:
    runs = [attempt("/a", num_devices=8, started_at="2026-11-24T23:59:59+00:00"), attempt("/b")]
    rows = make_bill(runs, "day").rows
    assert rows[0].group == "2026-11-24"
    assert rows[0].device_hours == 8
