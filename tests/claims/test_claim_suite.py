"""A suite from its first run to its report, with made-up runs: what is trained, in which order, and what is said."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT
from made_up_claims import HERE, SETTINGS, TWO_ARMS, MadeUpRuns
from rich.console import Console

from moe_train.claims import estimate, markdown, record, registered, report, suite
from moe_train.claims.library import load_claims
from moe_train.claims.made_up import PRICE
from moe_train.claims.plan import Plan, PlannedRun, make_plan
from moe_train.claims.results import Folder
from moe_train.claims.section import section
from moe_train.claims.suite import Asked
from moe_train.claims.verdict import Judged
from moe_train.cost.attempt import FINISHED, Attempt, as_line
from moe_train.errors import UserError
from moe_train.forecast.commands import named_hardware
from moe_train.sweeps.devices import Devices

Make = Callable[..., Any]


def better(by: float) -> Callable[[PlannedRun], float]:
    """Losses of arm `two` below those of `one`, seeds in common scattering far more than pairs."""

    def loss(run: PlannedRun) -> float:
        common = 2.0 + 0.1 * (run.seed % 7)
        return common if run.arm == "one" else common - by + 0.001 * (run.seed % 2)

    return loss


def plans(asked: Asked) -> list[Plan]:
    claims = load_claims(asked.claims, asked.scale, asked.config_dir)
    return [make_plan(claim, asked.scale, asked.given, asked.config_dir) for claim in claims]


def judged(asked: Asked, start: MadeUpRuns, **changes: Any) -> list[Judged]:
    settings: dict[str, Any] = {"device": HERE, "console": Console(quiet=True)} | changes
    return suite.reproduce(asked, start=start, **settings)


@pytest.mark.parametrize(
    ("by", "verdict"), [(0.05, "supported"), (0.0, "refuted"), (-0.05, "refuted"), (0.0105, "inconclusive")]
)
def test_verdicts_follow_the_losses(by: float, verdict: str, asked: Make, claim_dir: Make) -> None:
    claim_dir()
    (found,) = judged(asked(), MadeUpRuns(plans(asked()), better(by)))
    assert found.verdict == verdict
    assert found.main.effect == pytest.approx(-by, abs=1e-3)
    low, high = found.main.interval or (0, 0)
    assert low < -by + 1e-3 < high + 2e-3


def test_arms_take_turns_seed_by_seed_with_the_same_data(asked: Make, claim_dir: Make) -> None:
    claim_dir()
    made = MadeUpRuns(plans(asked()), better(0.05))
    judged(asked(), made)
    assert [(run.seed, run.arm) for run in made.started] == [(s, a) for s in range(3) for a in ("one", "two")]
    for settings in made.settings:
        assert {"resume=auto", "cost.claim=mine", "cost.purpose=seed", "tracking.group=mine"} <= set(settings)
        assert any(o.startswith("tracking.tags=[") for o in settings)
        assert not any(o.startswith(("budget", "stop.usd")) for o in settings)


def test_what_is_there_is_not_made_again_and_shared_arms_are_made_once(asked: Make, claim_dir: Make) -> None:
    claim_dir()
    claim_dir("other", statement="The same arms again.")
    both = asked("mine,other")
    made = MadeUpRuns(plans(both), better(0.05))
    first, second = judged(both, made)
    assert len(made.started) == 6
    assert (first.verdict, second.verdict) == ("supported", "supported")
    judged(both, made)
    assert len(made.started) == 6
    content = record.read(both.out / "report.json")
    assert content["distinct_runs"] == 6
    assert content["usd_of_distinct_runs"] == pytest.approx(content["claims"][0]["usd"])


def test_an_incomplete_suite_is_not_looked_at_and_goes_on(asked: Make, claim_dir: Make) -> None:
    claim_dir()
    made = MadeUpRuns(plans(asked()), lambda run: None if run.seed == 2 else better(0.05)(run))
    left = asked().out / "runs" / plans(asked())[0].runs({"one": 0.003, "two": 0.003})[4].hash  # on another machine
    left.mkdir(parents=True)
    (left / "config.yaml").touch()
    (left / "ledger.json").write_text("{")
    (found,) = judged(asked(), made)
    assert found.verdict == "inconclusive"
    assert found.main.effect is None
    assert "4 of 6 planned runs are there" in found.reasons[0]
    assert any("the disk is full" in reason for reason in found.reasons)
    ((said),) = (reason for reason in found.reasons if left.name in reason)
    assert said.endswith(f"(runs/{left.name}.log; it is made anew once runs/{left.name} is removed)")
    (left / "checkpoints").mkdir()  # without which it keeps its bill
    (found,) = judged(asked(), made)
    ((said),) = (reason for reason in found.reasons if left.name in reason)
    assert said.endswith(f"(runs/{left.name}.log; it is made anew once runs/{left.name}/checkpoints is removed)")
    made.loss = better(0.05)
    (found,) = judged(asked(), made)
    assert found.verdict == "supported"
    assert len(made.started) == 10  # its ledger is written anew


def test_rates_are_tuned_alike_on_other_seeds_and_paid_for(asked: Make, claim_dir: Make) -> None:
    tuning = {"factors": [0.5, 1.0, 2.0], "tokens": 1280}
    claim_dir(scales={"cpu": TWO_ARMS["scales"]["cpu"] | {"tuning": tuning}})
    (plan,) = plans(asked())
    best = {"one": 2.0, "two": 0.5}

    def loss(run: PlannedRun) -> float | None:
        factor = run.rate / plan.arms[run.arm].rate
        if run.purpose == "tuning" and factor == 2.0 and run.arm == "two":
            return math.nan  # diverged: it has lost
        return better(0.05)(run) + abs(factor - best[run.arm])

    made = MadeUpRuns([plan], loss)
    made.know(plan, plan.runs({arm: plan.arms[arm].rate * factor for arm, factor in best.items()}))
    (found,) = judged(asked(), made)
    assert found.rates == {arm: pytest.approx(plan.arms[arm].rate * factor) for arm, factor in best.items()}
    assert found.verdict == "supported"
    assert found.usd_tuning is not None
    assert found.usd is not None
    assert 0 < found.usd_tuning < found.usd
    assert any("edge of its grid" in note for note in found.notes)
    assert any("two (tuning, seed 1000000" in note and "that rate has lost" in note for note in found.notes)
    count = len(made.started)
    (found,) = judged(asked(), made)
    assert len(made.started) == count  # a run that diverged is a result as well
    assert found.made == found.planned == 12


@pytest.mark.parametrize(("best", "tried"), [(8.0, [0.5, 1, 2, 4, 8, 16]), (0.25, [0.125, 0.25, 0.5, 1, 2])])
def test_a_grid_whose_edge_is_best_is_widened_for_all_arms_alike(
    best: float, tried: list[float], asked: Make, claim_dir: Make
) -> None:
    tuning = {"factors": [0.5, 1.0, 2.0], "tokens": 1280, "widenings": 3}
    claim_dir(scales={"cpu": TWO_ARMS["scales"]["cpu"] | {"tuning": tuning}})
    (plan,) = plans(asked())

    def loss(run: PlannedRun) -> float | None:
        of_arm = {"one": 1.0, "two": best}[run.arm]
        return better(0.05)(run) + abs(math.log(run.rate / plan.arms[run.arm].rate / of_arm))

    made = MadeUpRuns([plan], loss)
    made.know(plan, plan.tuning_runs([2.0**power for power in range(-6, 7)]))
    made.know(plan, plan.runs({"one": plan.arms["one"].rate, "two": plan.arms["two"].rate * best}))
    (found,) = judged(asked(), made)
    assert found.rates == {
        "one": pytest.approx(plan.arms["one"].rate),
        "two": pytest.approx(best * plan.arms["two"].rate),
    }
    for name, arm in plan.arms.items():
        rates = {run.rate for run in made.started if run.purpose == "tuning" and run.arm == name}
        assert sorted(rates) == pytest.approx([factor * arm.rate for factor in tried])
    assert found.made == found.planned == len(made.started) == 2 * len(tried) + 6
    assert not any("edge of its grid" in note for note in found.notes)
    judged(asked(), made)
    assert len(made.started) == found.made  # nothing is made twice
    assert "×0.5, ×1, ×2 the best after 1,280 tokens with another seed, and at most 3 rates more beyond an edge" in (
        (asked().out / report.MARKDOWN).read_text()
    )


def test_a_grid_is_not_widened_for_ever(asked: Make, claim_dir: Make, capsys: pytest.CaptureFixture[str]) -> None:
    tuning = {"factors": [1.0, 2.0], "tokens": 1280, "widenings": 2}
    claim_dir(scales={"cpu": TWO_ARMS["scales"]["cpu"] | {"tuning": tuning}})
    (plan,) = plans(asked())
    made = MadeUpRuns([plan], lambda run: better(0.05)(run) - math.log(run.rate))
    made.know(plan, plan.tuning_runs([1.0, 2.0, 4.0, 8.0]))
    made.know(plan, plan.runs({name: 8 * arm.rate for name, arm in plan.arms.items()}))
    suite.foretell(asked(), None, probe)
    assert "mine: at most 8 runs more for learning rates, where the best are at an edge" in capsys.readouterr().out
    (found,) = judged(asked(), made)
    assert found.rates == {name: pytest.approx(8 * arm.rate) for name, arm in plan.arms.items()}
    assert any("at the edge of its grid" in note for note in found.notes)


def test_arms_tuned_together_take_the_rate_that_is_best_for_all(asked: Make, claim_dir: Make) -> None:
    """One arm alone would take twice its rate, the other half of it, where the first is much worse off."""
    tuning = {"factors": [0.5, 1.0, 2.0, 4.0], "tokens": 1280, "together": True}
    claim_dir(scales={"cpu": TWO_ARMS["scales"]["cpu"] | {"tuning": tuning}})
    (plan,) = plans(asked())
    lost = {"one": {0.5: 0.35, 1.0: 0.2, 2.0: 0.0, 4.0: 0.1}, "two": {0.5: 0.0, 1.0: 0.1, 2.0: 0.4, 4.0: math.nan}}

    def loss(run: PlannedRun) -> float | None:
        return better(0.05)(run) + lost[run.arm][round(run.rate / plan.arms[run.arm].rate, 3)]

    made = MadeUpRuns([plan], loss)
    (found,) = judged(asked(), made)
    assert found.rates == {arm: pytest.approx(plan.arms[arm].rate) for arm in ("one", "two")}


def test_a_suite_made_again_takes_seeds_nobody_has_seen(asked: Make, claim_dir: Make) -> None:
    claim_dir(scales={"cpu": TWO_ARMS["scales"]["cpu"] | {"first_seed": 100}})
    (plan,) = plans(asked())
    made = MadeUpRuns([plan], better(0.05))
    (found,) = judged(asked(), made)
    count = plan.scale.seeds
    assert {result.run.config.seed for result in found.results} == set(range(100, 100 + count))
    page = (asked().out / report.MARKDOWN).read_text()
    assert f"{count} seeds (100 to {99 + count})" in page
    assert f"mine (seeds 100 to {99 + count}) |" in page


def test_arms_of_other_rates_are_not_tuned_together(asked: Make, claim_dir: Make) -> None:
    tuning = {"factors": [0.5, 1.0], "tokens": 1280, "together": True}
    arms = {**TWO_ARMS["arms"], "two": {"overrides": ["optimizer.lr=0.007"]}}
    varies = ["model.moe.top_k", "optimizer.lr"]
    claim_dir(arms=arms, varies=varies, scales={"cpu": TWO_ARMS["scales"]["cpu"] | {"tuning": tuning}})
    with pytest.raises(UserError, match=r"tuning\.together gives all arms one rate, .*two 0\.007\): make them equal"):
        plans(asked())


def test_what_was_registered_before_arms_could_be_tuned_together_still_holds(asked: Make, claim_dir: Make) -> None:
    claim_dir(scales={"cpu": TWO_ARMS["scales"]["cpu"] | {"tuning": {"factors": [0.5, 1.0], "tokens": 1280}}})
    (plan,) = plans(asked())
    registered.register(plan, Folder(asked().out))
    file = registered.file_of(plan, Folder(asked().out))
    content = json.loads(file.read_text())
    del content["protocol"]["scale"]["tuning"]["together"], content["protocol"]["scale"]["first_seed"]
    file.write_text(json.dumps(content))
    assert registered.check(plan, Folder(asked().out)) == content["date"]
    content["protocol"]["scale"]["tuning"]["tokens"] = 2560
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"scale\.tuning\.tokens=2560, not 1280"):
        registered.check(plan, Folder(asked().out))


def test_a_rate_whose_run_failed_has_not_lost(asked: Make, claim_dir: Make) -> None:
    tuning = {"factors": [0.5, 1.0], "tokens": 1280}
    claim_dir(scales={"cpu": TWO_ARMS["scales"]["cpu"] | {"tuning": tuning}})
    (plan,) = plans(asked())
    made = MadeUpRuns([plan], lambda run: None if run.rate < plan.arms[run.arm].rate else better(0.05)(run))
    (found,) = judged(asked(), made)
    assert len(made.started) == 4  # nothing is trained at rates that are not known to be the best
    assert found.verdict == "inconclusive"
    assert any("the disk is full" in reason for reason in found.reasons)


def test_an_arm_that_diverges_is_said_and_kept(asked: Make, claim_dir: Make) -> None:
    claim_dir()
    made = MadeUpRuns(plans(asked()), lambda run: math.nan if (run.arm, run.seed) == ("two", 1) else better(0.05)(run))
    for _ in range(2):
        (found,) = judged(asked(), made)
        assert found.verdict == "inconclusive"
        assert found.main.effect is None
    assert len(made.started) == 6
    diverged = made.started[3]
    said = "two (seed 1, 2,560 tokens, lr 0.003) diverged (the loss is nan at step 3: lower optimizer.lr)"
    assert any(reason.startswith(said) and f"runs/{diverged.hash}.log is removed" in reason for reason in found.reasons)
    (asked().out / f"runs/{diverged.hash}.log").unlink()
    made.loss = better(0.05)
    (found,) = judged(asked(), made)
    assert found.verdict == "supported"


def test_a_margin_that_is_moved_after_the_runs_is_refused(asked: Make, claim_dir: Make) -> None:
    claim_dir()
    judged(asked(), MadeUpRuns(plans(asked()), better(0.05)))
    moved = TWO_ARMS["comparisons"][0] | {"test": {"kind": "superiority", "margin": 0.001}}
    claim_dir(comparisons=[moved])
    with pytest.raises(UserError, match=r"with claim\.comparisons\.0\.test\.margin=0\.01, not 0\.001: runs are there"):
        asked().plans()
    claim_dir(statement="One expert a token is better than two.")
    with pytest.raises(UserError, match=r"was registered on .* with claim\.statement=.*: runs are there"):
        asked().plans()
    claim_dir(published="Only said better.")
    assert asked().plans()


def test_jobs_that_share_a_device_are_no_measure_of_seconds(asked: Make, claim_dir: Make) -> None:
    claim_dir()
    slow = MadeUpRuns(plans(asked()), better(0.05))

    class Slow:
        pid = 2**30

        def __init__(self, job: Any) -> None:
            self.job, self.asked = job, 0

        def poll(self) -> int | None:
            self.asked += 1
            return self.job.poll() if self.asked > 1 else None

    (found,) = suite.reproduce(
        asked(jobs=2), start=lambda *args: Slow(slow(*args)), device=HERE, console=Console(quiet=True)
    )
    assert found.verdict == "supported"  # of losses
    assert any(o.startswith("num_threads=") for o in slow.settings[0])  # cores are shared out
    assert found.axes[0].axes["seconds"] is None
    assert found.axes[0].axes["usd"] is None
    assert found.axes[0].axes["tokens"] is not None
    assert any("timed beside 1 other jobs" in note for note in found.notes)


def test_a_run_that_went_on_on_other_hardware_is_no_measure_of_seconds(asked: Make, claim_dir: Make) -> None:
    claim_dir()
    made = MadeUpRuns(plans(asked()), better(0.05))
    judged(asked(), made)
    file = asked().out / "runs" / made.started[0].hash / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"earlier_hardware": ["h100"]}))
    (found,) = judged(asked(), made)
    assert found.verdict == "supported"  # of losses
    assert found.axes[0].axes["seconds"] is None
    assert any("made in part on h100" in note for note in found.notes)


@pytest.mark.parametrize(
    ("earlier", "says"),
    [({"num_threads": 2}, "with 2 threads"), ({"price_usd_per_hour": 2 * PRICE}, r"at \$0.2 an hour")],
)
def test_a_run_that_went_on_under_other_terms_is_no_measure_of_seconds(
    earlier: dict[str, Any], says: str, asked: Make, claim_dir: Make
) -> None:
    """Interrupted and gone on with another number of threads: its summary has those of the end alone."""
    claim_dir()
    made = MadeUpRuns(plans(asked()), better(0.05))
    judged(asked(), made)
    file = asked().out / "runs" / made.started[0].hash / "ledger.json"
    (attempt,) = json.loads(file.read_text())["attempts"]
    last = attempt | {"num_threads": 1, "train_seconds": 5.0}
    first = last | earlier | {"id": "earlier", "status": "interrupted"}
    for attempts, found_so in (([last], False), ([first, last], True), ([first | {"train_seconds": 0.0}, last], False)):
        file.write_text(json.dumps({"attempts": attempts}))
        (found,) = judged(asked(), made)
        assert found.verdict == "supported"  # of losses
        assert (found.axes[0].axes["seconds"] is None) == found_so
        assert any(re.search(f"made in part {says}", note) for note in found.notes) == found_so


@pytest.mark.parametrize(
    ("measure", "says"),
    [
        ("max_violation", "max_violation of arm one, which has no experts"),
        ("generation_speed_up", "generation_speed_up of arm one, which has no MTP module"),
    ],
)
def test_what_an_arm_does_not_have_is_not_found_missing_after_its_runs(
    measure: str, says: str, asked: Make, claim_dir: Make
) -> None:
    comparison = {"arm": "one", "against": None, "measure": measure, "test": {"kind": "above", "margin": 1.0}}
    arms = {"one": {"overrides": ["model=dense_nano"]}, "two": {"overrides": ["model=dense_nano", "optimizer.lr=0.5"]}}
    claim_dir(comparisons=[comparison], base=[o for o in SETTINGS if not o.startswith("model.moe")], arms=arms)
    with pytest.raises(UserError, match=says):
        plans(asked())


def test_a_setting_that_may_vary_is_one(asked: Make, claim_dir: Make) -> None:
    claim_dir(varies=["model.moe.top_k", "optimizer.weightdecay"])
    with pytest.raises(UserError, match=r"varies names optimizer\.weightdecay, which no arm has: did you mean optim"):
        plans(asked())


def curve_claim(measure: str) -> dict[str, Any]:
    comparison = {
        "arm": "two",
        "against": "one",
        "measure": measure,
        "test": {"kind": "ratio_above", "margin": 1.2},
    }
    scale = {"overrides": [], "tokens": [2560, 3840, 5120, 7680], "seeds": 3}
    return {"comparisons": [comparison], "scales": {"cpu": scale}}


def learns(faster: float) -> Callable[[PlannedRun], float]:
    return lambda run: 1.0 + 50 * (run.tokens * (faster if run.arm == "two" else 1.0)) ** -0.5 + 0.01 * run.seed


@pytest.mark.parametrize(("faster", "verdict"), [(2.0, "supported"), (1.0, "refuted")])
def test_cost_to_target_on_all_axes(faster: float, verdict: str, asked: Make, claim_dir: Make) -> None:
    claim_dir(**curve_claim("usd_to_target"))
    (found,) = judged(asked(), MadeUpRuns(plans(asked()), learns(faster)))
    assert found.verdict == verdict
    assert found.main.effect == pytest.approx(faster, rel=0.05)
    axes = found.axes[0].axes
    assert found.axes[0].at == "equal loss"
    assert all(axes[axis] is not None for axis in ("tokens", "flops", "seconds", "usd"))
    # Two experts a token cost more FLOPs than one.
    assert axes["flops"].ratio < axes["tokens"].ratio  # type: ignore[union-attr]


@pytest.mark.parametrize("price", [0.0, None])
@pytest.mark.parametrize("measure", ["usd_to_target", "seconds_to_target"])
def test_without_a_price_there_is_no_verdict_on_dollars_and_there_is_one_on_seconds(
    price: float | None, measure: str, asked: Make, claim_dir: Make
) -> None:
    """At a price of 0 the ratio of dollars is no number, and a claim on it was once supported."""
    claim_dir(**curve_claim(measure))
    made = MadeUpRuns(plans(asked()), learns(2.0))
    made.changed = {"price_usd_per_hour": price, "usd_train": price, "usd_total": price}
    (found,) = judged(asked(), made, device=dataclasses.replace(HERE, price_usd_per_hour=price))
    assert found.axes[0].axes["usd"] is None
    assert found.axes[0].axes["seconds"] is not None
    assert any(note.startswith("dollars are not compared: no price above 0 is known") for note in found.notes)
    assert found.verdict == ("supported" if measure == "seconds_to_target" else "inconclusive")
    assert found.main.effect == (pytest.approx(2.0, rel=0.05) if measure == "seconds_to_target" else None)


def test_the_price_of_a_run_on_a_gpu_is_not_divided_by_the_hosts_threads(asked: Make, claim_dir: Make) -> None:
    claim_dir(**curve_claim("usd_to_target"))
    made = MadeUpRuns(plans(asked()), learns(2.0))
    made.changed = {"hardware": "h200", "device_name": "NVIDIA H200", "price_usd_per_hour": 3.2, "num_threads": 16}
    with_gpu = HERE.__class__("NVIDIA H200", 1, True, "h200", 3.2)
    judged(asked(), made, device=with_gpu)
    with pytest.raises(UserError, match=r"was made on NVIDIA H200 at \$3\.2 an hour, not on made up at"):
        judged(asked(), made)


def test_runs_of_another_price_are_refused_before_training(asked: Make, claim_dir: Make) -> None:
    claim_dir(**curve_claim("usd_to_target"))
    made = MadeUpRuns(plans(asked()), learns(2.0))
    judged(asked(), made)
    dearer = HERE.__class__(HERE.name, 1, False, "cpu", 2 * PRICE)
    with pytest.raises(UserError, match=r"at \$0\.1 an hour, not on made up at \$0\.2 an hour: give another out="):
        judged(asked(), made, device=dearer)


def probe(overrides: Any, tokens: int) -> dict[str, Any]:
    seconds = {"value": 100.0, "low": 90.0, "high": 120.0}
    return {
        "flops_per_token": 1e4,
        "tokens_per_second": {"value": 1000.0, "low": 900.0, "high": 1100.0},
        "wall_seconds": seconds,
        "train_seconds": {"value": 90.0, "low": 80.0, "high": 110.0},
        "usd_total": {"value": 1.0, "low": 0.9, "high": 1.2},
        "device": "made up",
    }


def test_a_dry_run_says_what_is_to_come_and_trains_nothing(asked: Make, claim_dir: Make) -> None:
    claim_dir()
    (row,) = suite.foretell(asked(), None, probe)
    assert (row["runs"], row["runs_there"], row["verdict"]) == (6, 0, None)
    (plan,) = plans(asked())
    flops = sum(run.flops for run in plan.runs(plan.untuned()))
    assert row["flops"] == pytest.approx(flops)
    assert row["seconds"]["value"] == pytest.approx(6 * 10 + flops / 1e4 / 1000)  # type: ignore[index]
    (sees,) = row["power"]  # type: ignore[misc]
    assert "3 seeds scattering by 0.01 see an effect" in sees["power"]
    low, high = row["usd_interval"]  # type: ignore[misc]
    assert low < row["usd"] < high  # type: ignore[operator]
    judged(asked(), MadeUpRuns([plan], better(0.05)))
    (row,) = suite.foretell(asked(), None, probe)
    assert (row["runs_there"], row["seconds"]["value"]) == (6, 0)  # type: ignore[index]


def test_a_probe_is_kept_for_the_price_and_threads_it_was_made_with(asked: Make, claim_dir: Make) -> None:
    claim_dir()
    calls: list[Any] = []

    def counted(overrides: Any, tokens: int) -> dict[str, Any]:
        calls.append(overrides)
        return probe(overrides, tokens)

    def foretell(*given: str) -> None:
        suite.foretell(asked(given=given), None, counted)

    foretell("hardware.price_usd_per_hour=1")
    foretell("hardware.price_usd_per_hour=1")
    assert len(calls) == 1
    foretell("hardware.price_usd_per_hour=10")
    foretell("hardware.price_usd_per_hour=1", "num_threads=1")
    assert len(calls) == 3
    for damaged in ("[]", "{}", "[", '{"flops_per_token": null}'):
        for file in (asked().out / "probes").iterdir():
            file.write_text(damaged)
        foretell("hardware.price_usd_per_hour=1")
    assert len(calls) == 7


def test_a_gpu_one_does_not_have_costs_the_price_that_is_given(asked: Make, claim_dir: Make) -> None:
    claim_dir()
    rows = []
    for price in (1.5, 15):
        given = (f"hardware.price_usd_per_hour={price}",)
        rows += suite.foretell(asked(given=given), named_hardware("h100", None, None), probe)
    assert rows[1]["usd"] == pytest.approx(10 * rows[0]["usd"])  # type: ignore[operator]
    assert str(rows[0]["source"]).endswith("$1.5 an hour (given in the configuration)")


def test_a_gpu_one_does_not_have_is_reckoned_from_one_that_was_measured(asked: Make, claim_dir: Make) -> None:
    claim_dir()
    found = {}
    for name in ("h200", "rtx_4090"):
        (row,) = suite.foretell(asked(), named_hardware(name, None, None), probe)
        seconds, (low, high) = row["seconds"], row["usd_interval"]  # type: ignore[misc]
        assert seconds["low"] < seconds["value"] < seconds["high"]  # type: ignore[index]
        assert low < row["usd"] < high  # type: ignore[operator]
        assert "as measured on an H200" in str(row["source"])
        assert "4 s (3 to 12) a run round its steps" in str(row["source"])
        found[name] = row
    assert "not measured there; 4 s" in str(found["rtx_4090"]["source"])
    assert "not measured there" not in str(found["h200"]["source"])
    assert found["rtx_4090"]["seconds"]["value"] > found["h200"]["seconds"]["value"]  # type: ignore[index]
    with pytest.raises(UserError, match=r"hardware=t4 has no BF16 peak to reckon with: choose another"):
        suite.foretell(asked(), named_hardware("t4", None, None), probe)


@pytest.mark.parametrize(("file", "within"), [("nvidia_h200", 1.01), ("nvidia_h200_nano", 1.15)])
def test_that_reckoning_is_near_what_is_published_of_an_h200(file: str, within: float) -> None:
    figures = json.loads((ROOT / f"docs/results/{file}.json").read_text())["figures"]
    step = {each["name"]: each for each in figures if each["suite"] == "step"}
    note = step["utilization_of_measured_peak"]["note"]
    flops = 1e6 * float(note.split(" MFLOPs a token")[0])
    rate = estimate.H200_FLOPS * min(1.0, flops / estimate.H200_AT) ** estimate.H200_FALLS
    assert 1 / within < rate / (flops * step["tokens_per_second"]["value"]) < within


def test_a_dry_run_of_a_gpus_scale_without_one_says_what_it_is_of(
    asked: Make, claim_dir: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    claim_dir(scales={"gpu": TWO_ARMS["scales"]["cpu"]})
    monkeypatch.setattr(suite, "devices_here", Devices)
    suite.foretell(dataclasses.replace(asked(), scale="gpu"), None, probe)
    assert "there is none: what follows is of this CPU" in capsys.readouterr().err


def test_a_budget_too_small_for_the_runs_is_refused(asked: Make, claim_dir: Make, tmp_path: Path) -> None:
    claim_dir()
    given = ("tracking=none", f"cost.ledger={tmp_path}/ledger.jsonl")
    made = MadeUpRuns(plans(asked(given=given)), better(0.05))
    with pytest.raises(UserError, match=r"budget\.usd=0\.01: .* take at least .*: raise it, or choose fewer claims"):
        judged(asked(given=given, usd=0.01), made, probe=probe)
    assert not made.started


def test_what_runs_have_cost_is_known_by_whatever_path_their_folder_is_named(
    asked: Make, claim_dir: Make, tmp_path: Path
) -> None:
    """From another directory the ledger is another too."""
    claim_dir()
    given = ("tracking=none", f"cost.ledger={tmp_path}/ledger.jsonl")
    made = MadeUpRuns(plans(asked(given=given)), better(0.05))
    judged(asked(given=given), made)
    elsewhere = asked(given=("tracking=none", f"cost.ledger={tmp_path}/other.jsonl"), usd=1.0)
    by_a_detour = dataclasses.replace(elsewhere, out=tmp_path / "own/../out")
    spent = by_a_detour.budget(by_a_detour.plans()).spent()
    accounts = [json.loads(path.read_text()) for path in (tmp_path / "out/runs").glob("*/ledger.json")]
    assert spent == pytest.approx(sum(each["usd"] for account in accounts for each in account["attempts"]))
    assert len(accounts) == 6
    assert spent > 0


def test_a_suite_whose_runs_are_all_there_needs_no_budget(asked: Make, claim_dir: Make, tmp_path: Path) -> None:
    """Its runs have the rates that tuning chose, not the arms' own."""
    claim_dir(scales={"cpu": TWO_ARMS["scales"]["cpu"] | {"tuning": {"factors": [0.5, 1.0], "tokens": 1280}}})
    given = ("tracking=none", f"cost.ledger={tmp_path}/ledger.jsonl")
    (plan,) = plans(asked(given=given))
    half = {arm: plan.arms[arm].rate * 0.5 for arm in plan.arms}
    made = MadeUpRuns([plan], lambda run: better(0.05)(run) + run.rate)
    made.know(plan, plan.runs(half))
    judged(asked(given=given), made)
    (row,) = suite.foretell(asked(given=given), None, probe)
    assert row["runs_there"] == row["runs"] == 10
    (found,) = judged(asked(given=given, usd=1e-6), made, probe=probe)
    assert found.verdict == "supported"


def test_no_run_is_started_that_the_budget_cannot_pay_for(asked: Make, claim_dir: Make, tmp_path: Path) -> None:
    claim_dir()
    ledger = tmp_path / "ledger.jsonl"
    given = ("tracking=none", f"cost.ledger={ledger}")
    limited = asked(given=given, usd=3.5)
    made = MadeUpRuns(plans(limited), better(0.05))

    def paid(*args: Any) -> Any:
        job = made(*args)
        (sweep,) = (o.removeprefix("cost.sweep=").strip("'") for o in args[0] if o.startswith("cost.sweep="))
        line = Attempt(run=str(len(made.started)), sweep=sweep, usd=1.0, wall_seconds=1.0, status=FINISHED)
        with ledger.open("a") as file:
            file.write(as_line(line) + "\n")
        return job

    cheap = lambda overrides, tokens: probe(overrides, tokens) | {"usd_total": {"value": 1e-6}}  # noqa: E731
    (found,) = suite.reproduce(limited, start=paid, device=HERE, probe=cheap, console=Console(quiet=True))
    assert len(made.started) == 3
    assert found.verdict == "inconclusive"
    says = "has $0.5 left, and the next run needs about $1: 3 of 6 runs were not started"
    assert any(says in reason for reason in found.reasons)


# --------------------------------------------------------------------------------------------------------- report


def test_every_figure_of_the_report_leads_to_run_folders(asked: Make, claim_dir: Make) -> None:
    claim_dir(**curve_claim("flops_to_target"))
    (found,) = judged(asked(), MadeUpRuns(plans(asked()), learns(2.0)))
    out = asked().out
    content = json.loads((out / "report.json").read_text())
    (claim,) = content["claims"]
    assert {"claim", "scale", "verdict", "effect", "interval", "runs", "usd"} <= set(claim)
    assert claim["runs"] == claim["planned_runs"] == len(claim["run_list"]) == 24
    for run in claim["run_list"]:
        summary = json.loads((out / run["folder"] / "summary.json").read_text())
        assert summary["val_loss"] == run["val_loss"]
        assert summary["config_hash"] == run["hash"]
    assert (out / claim["protocol"]).exists()
    text = (out / "REPORT.md").read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (out / link).exists(), link
    assert "proves nothing" not in text
    assert f"**{found.verdict}**" in text


def test_the_report_says_why_and_what_it_rests_on(asked: Make, claim_dir: Make) -> None:
    """What a referee asks: which comparison decided, what the arms were, how rates were chosen, what was left out."""
    curve = curve_claim("flops_to_target")
    side = {"arm": "four", "against": "one", "measure": "val_loss", "test": {"kind": "tost", "margin": 0.01}}
    also = {"arm": "two", "against": "one", "measure": "val_loss", "test": {"kind": "superiority", "margin": 9.0}}
    scale = curve["scales"]["cpu"] | {"without": ["four"], "tuning": {"factors": [0.5, 1.0], "tokens": 1280}}
    claim_dir(
        arms=TWO_ARMS["arms"] | {"four": {"overrides": ["model.moe.top_k=4"]}},
        comparisons=[*curve["comparisons"], also, side],
        scales={"cpu": scale},
    )
    (plan,) = plans(asked())
    made = MadeUpRuns([plan], lambda run: learns(2.0)(run) + abs(run.rate / plan.arms[run.arm].rate - 1))
    (found,) = judged(asked(), made)
    assert found.verdict == "refuted"
    (claim,) = record.read(asked().out / "report.json")["claims"]
    text = (asked().out / "REPORT.md").read_text()
    assert "Verdict: refuted, since of 2 comparisons that decide `val_loss of two is lower by more than 9" in text
    assert "of every arm's rate ×0.5, ×1 the best after 1,280 tokens with another seed" in text
    assert "left out at this scale: arms four, and with them 1 of 3 comparisons" in text
    assert "| one | `model.moe.top_k=1` |" in text
    assert "All arms: `data=text_files`" in text
    assert "power not reckoned: it hangs on the slopes of the curves" in text
    assert re.search(r"3 seeds scattering by 0.01 see an effect .* beyond its bound in 80% of suites", text)
    one, _ = claim["fits"]
    assert one["exponent"] == pytest.approx(0.5, abs=0.05)
    assert one["residual"] < 0.01
    assert "no loss" not in text
    assert any("below zero is no loss" in line for line in section(claim | {"fits": [one | {"limit": -13.0}]}))
    # Both comparisons that decide stand in the table, not the first alone.
    assert re.search(r"\*\*refuted\*\* \| .*times the FLOPs \(.*\), \w+; .*nats a token \(.*\), refuted \|", text)


def test_an_early_look_computes_nothing(asked: Make, claim_dir: Make) -> None:
    """With one run of six missing, and again when it is there: one look alone has a statistic."""
    claim_dir()
    made = MadeUpRuns(plans(asked()), lambda run: None if (run.arm, run.seed) == ("two", 2) else better(0.05)(run))
    (early,) = judged(asked(), made)
    (entry,) = record.read(asked().out / "report.json")["claims"]
    assert all(each["p_supported"] is None and not each["values"] for each in entry["comparisons"])
    assert not early.axes
    assert entry["p_supported_over_all_claims"] is None


def test_the_page_needs_nothing_else(asked: Make, claim_dir: Make) -> None:
    claim_dir()
    judged(asked(), MadeUpRuns(plans(asked()), better(0.05)))
    page = (asked().out / "report.html").read_text()
    assert page.count("<svg") == 1
    assert "MaxVio" in page
    assert not re.findall(r"<(?:script|link|img)\b|src=|@import", page)
    assert not re.findall(r'href="(?!#|runs/|registered/)', page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert all(target in ids for target in re.findall(r'xlink:href="#([^"]+)"', page))


def test_a_smoke_test_decides_nothing_and_no_row_says_what_would_follow(
    asked: Make, claim_dir: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    claim_dir()
    smoke = dataclasses.replace(asked(), scale="smoke")
    (found,) = judged(smoke, MadeUpRuns(plans(smoke), better(0.05)))
    assert (found.verdict, found.main.verdict) == ("inconclusive", "inconclusive")
    assert found.main.p_supported is not None
    assert found.main.p_supported < 0.01
    text = (smoke.out / "REPORT.md").read_text()
    (row,) = re.findall(r"^\| comparison .*\n.*\n\| (.*)$", text, re.M)
    assert row.split(" | ")[1] == "not decided"
    assert "proves nothing" in text
    assert "supported" not in capsys.readouterr().out
    (claim,) = record.read(smoke.out / "report.json")["claims"]
    assert [each["verdict"] for each in claim["comparisons"]] == ["inconclusive"]


def test_the_readmes_section_is_the_reports_and_replaces_the_one_before(
    asked: Make, claim_dir: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    claim_dir()
    judged(asked(), MadeUpRuns(plans(asked()), better(0.05)))
    content = record.read(asked().out / "report.json")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{markdown.BEGIN}\nold\n{markdown.END}\nafter\n")
    for _ in range(2):
        markdown.write_readme(readme, {"out/report.json": content, "other.json": content})
    text = readme.read_text()
    assert text.startswith(f"before\n{markdown.BEGIN}\n**Claims put to the test**: 12 runs that finished, ")
    assert text.endswith(f"{markdown.END}\nafter\n")
    (row,) = [line for line in text.splitlines() if line.startswith("| mine | cpu |")]
    asks = "val_loss of two is lower by more than 0.01 against one"
    assert row.startswith(f"| mine | cpu | **supported** | {asks}: -0.0497 nats a token (-0.0")
    assert row.endswith(
        "(out/report.json), made up, 1 thread, float32 | [supported](other.json), -0.0497 nats a token |"
    )
    markdown.write_readme(readme, {"other.json": content, "out/report.json": content})
    assert readme.read_text() == text
    assert "no longer" not in capsys.readouterr().err
    markdown.write_readme(readme, {"other.json": content})
    assert f"no longer in {readme}, as report= did not name them: out/report.json" in capsys.readouterr().err
    readme.write_text("nothing")
    with pytest.raises(UserError, match="has no place for it"):
        markdown.write_readme(readme, {"x": content})


def test_claims_that_were_reported_before_stay_in_the_report(asked: Make, claim_dir: Make) -> None:
    for name in ("mine", "other"):
        claim_dir(name)
        judged(asked(name), MadeUpRuns(plans(asked(name)), better(0.05)))
    claims = record.read(asked().out / "report.json")["claims"]
    assert [claim["claim"] for claim in claims] == ["mine", "other"]
    for claim in claims:
        assert claim["p_supported_over_all_claims"] == pytest.approx(2 * claim["p_supported"])


def test_an_out_folder_in_use_is_refused(asked: Make, claim_dir: Make) -> None:
    import filelock

    claim_dir()
    asked().out.mkdir()
    with filelock.FileLock(asked().out / ".lock"), pytest.raises(UserError, match="in use by another suite"):
        judged(asked(), MadeUpRuns(plans(asked()), better(0.05)))


def test_a_folder_that_holds_no_report_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no report"):
        record.read(tmp_path / "report.json")
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(UserError, match="is no report of claims"):
        record.read(tmp_path / "report.json")


def test_a_finished_run_is_known_by_its_folder(tmp_path: Path, plan_of: Make) -> None:
    plan = plan_of()
    run = plan.runs(plan.untuned())[0]
    folder = Folder(tmp_path / "out")
    assert folder.result(run) is None
    assert folder.runs.spent(run.hash) == 0
