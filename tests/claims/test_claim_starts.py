"""Arms that start from another arm's run: what they wait for, what they cost, and that they started where they say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up_claims import HERE, MadeUpRuns
from rich.console import Console

from moe_train.claims import record, suite
from moe_train.claims.plan import PlannedRun
from moe_train.claims.suite import Asked
from moe_train.claims.verdict import Judged
from moe_train.config import ModelConfig
from moe_train.errors import UserError
from moe_train.training import upcycle

Make = Callable[..., Any]

WHOLE = "model.moe.moe_intermediate_size=48"  # experts as wide as the dense FFN
ARMS: dict[str, Any] = {
    "dense": {"overrides": ["model.moe=null"], "seed_offset": 50},
    "upcycled": {"overrides": [WHOLE], "starts_from": "dense"},
    "scratch": {"overrides": [WHOLE], "flops_of": "upcycled"},
}
COMPARISON: dict[str, Any] = {
    "arm": "upcycled",
    "against": "scratch",
    "measure": "val_loss",
    "test": {"kind": "superiority", "margin": 0.0},
}
CLAIM: dict[str, Any] = {"arms": ARMS, "varies": ["model.moe"], "comparisons": [COMPARISON]}
TUNED: dict[str, Any] = {
    "cpu": {"overrides": [], "tokens": [2560], "seeds": 3, "tuning": {"factors": [0.5, 1.0], "tokens": 1280}}
}


@pytest.fixture(autouse=True)
def upcycled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Path]]:
    """What was made of which run; the weights themselves are made in the end-to-end test."""
    made = []

    def upcycle_run(run: Path, out: Path, mixture: ModelConfig, name: str, seed: int) -> None:
        made.append((run, out))
        place = out / "checkpoints/step_0"
        place.mkdir(parents=True)
        steps = json.loads((run / "summary.json").read_text())["steps"]
        origin = f"upcycled from the dense nano of {run.name}, step {steps}"
        (place / "state.json").write_text(json.dumps({"origin": origin}))
        (out / "configs/model").mkdir(parents=True)
        (out / "configs/model/claim_start.yaml").write_text(f"# {origin}\nname: claim_start\n")

    monkeypatch.setattr(upcycle, "upcycle_run", upcycle_run)
    return made


def loss_of(run: PlannedRun) -> float:
    return 2.0 + 0.01 * (run.seed % 50) - (0.1 if run.arm == "upcycled" else 0.0)


def judged(asked: Asked, made: MadeUpRuns, **changes: Any) -> Judged:
    settings: dict[str, Any] = {"device": HERE, "console": Console(quiet=True)} | changes
    (found,) = suite.reproduce(asked, start=made, **settings)
    return found


def test_a_run_begins_with_the_weights_of_the_other_arms_run_of_its_seed(
    asked: Make, claim_dir: Make, upcycled: list[tuple[Path, Path]]
) -> None:
    claim_dir(**CLAIM)
    (plan,) = asked().plans()
    made = MadeUpRuns([plan], loss_of)
    found = judged(asked(), made)
    assert found.verdict == "supported"
    assert [(run.arm, run.seed) for run in made.started][:4] == [
        ("dense", 50),
        ("upcycled", 0),
        ("scratch", 0),
        ("dense", 51),
    ]
    dense, mixture = made.started[:2]
    assert mixture.start is not None
    assert mixture.start.hash == dense.hash
    place = Path(mixture.config.init_from or "").absolute()
    assert upcycled[0] == (asked().out / "runs" / dense.hash, place)
    assert f"init_from='{mixture.config.init_from}'" in made.settings[1]
    judged(asked(), made)
    assert (len(made.started), len(upcycled)) == (9, 3)  # neither is made again


def test_what_the_start_cost_is_counted(asked: Make, claim_dir: Make) -> None:
    claim_dir(**CLAIM)
    (plan,) = asked().plans()
    dense, mixture, scratch = plan.runs(plan.untuned())[:3]
    assert scratch.flops == pytest.approx(dense.flops + mixture.flops, rel=1e-3)
    found = judged(asked(), MadeUpRuns([plan], loss_of))
    axes = found.axes[0].axes
    assert found.axes[0].at == "the end of both"
    assert axes["flops"] is not None
    assert axes["flops"].ratio == pytest.approx(1.0, rel=0.05)  # whole steps
    assert axes["tokens"] is not None
    assert axes["tokens"].ratio == pytest.approx(scratch.tokens / (dense.tokens + mixture.tokens), rel=0.05)
    (entry,) = record.read(asked().out / record.JSON)["claims"]
    curves = entry["curves"]
    assert curves["upcycled"]["tokens"][0] > curves["dense"]["tokens"][-1]
    assert entry["arms"]["upcycled"]["starts_from"] == "dense"


def test_rates_are_tuned_from_a_run_of_the_usual_rate(asked: Make, claim_dir: Make) -> None:
    claim_dir(**CLAIM, scales=TUNED)
    (plan,) = asked().plans()
    tuning = plan.tuning_runs()
    starts = {run.start.rate for run in tuning if run.start is not None}
    assert starts == {plan.arms["dense"].rate}
    made = MadeUpRuns([plan], loss_of)
    # The first of the upcycled runs comes before its start: it waits, and the others do not wait for it.
    made.know(plan, plan.runs({arm: plan.arms[arm].rate * 0.5 for arm in plan.arms}))
    found = judged(asked(), made)
    assert found.verdict == "supported"
    order = [(run.arm, run.rate / plan.arms[run.arm].rate) for run in made.started[:6]]
    assert order.index(("dense", 1.0)) < order.index(("upcycled", 0.5))


def test_a_run_whose_start_failed_is_not_begun(asked: Make, claim_dir: Make) -> None:
    claim_dir(**CLAIM)
    (plan,) = asked().plans()
    made = MadeUpRuns([plan], lambda run: None if (run.arm, run.seed) == ("dense", 51) else loss_of(run))
    found = judged(asked(), made)
    assert ("upcycled", 1) not in [(run.arm, run.seed) for run in made.started]
    assert any("upcycled (seed 1, 2,560 tokens" in each and "nothing to start from" in each for each in found.reasons)


def test_weights_of_another_run_are_found(asked: Make, claim_dir: Make, upcycled: list[tuple[Path, Path]]) -> None:
    claim_dir(**CLAIM)
    (plan,) = asked().plans()
    made = MadeUpRuns([plan], loss_of)
    judged(asked(), made)
    (_, first), (_, second) = upcycled[:2]
    states = [place / "checkpoints/step_0/state.json" for place in (first, second)]
    states[0].write_text(states[1].read_text())
    found = judged(asked(), made)
    assert found.verdict == "inconclusive"
    assert any("arm upcycled did not start from runs/" in reason for reason in found.reasons)
    states[0].unlink()
    (first / "configs/model/claim_start.yaml").unlink()
    found = judged(asked(), made)
    assert any("what arm upcycled started from is not there any more" in reason for reason in found.reasons)


def test_checkpoints_that_were_removed_to_save_room_are_not_missed(
    asked: Make, claim_dir: Make, upcycled: list[tuple[Path, Path]]
) -> None:
    claim_dir(**CLAIM)
    (plan,) = asked().plans()
    made = MadeUpRuns([plan], loss_of)
    judged(asked(), made)
    for checkpoints in list(asked().out.rglob("checkpoints")):
        shutil.rmtree(checkpoints)
    found = judged(asked(), made)
    assert (found.verdict, found.reasons) == ("supported", [])
    assert (len(made.started), len(upcycled)) == (9, 3)


def test_a_start_without_its_checkpoint_ends_no_suite(asked: Make, claim_dir: Make) -> None:
    """The upcycled run of seed 0 is missing, and so is what it would begin with."""
    claim_dir(**CLAIM)
    claim_dir("other", scales={"cpu": {"overrides": [], "tokens": [2560], "seeds": 3, "first_seed": 9}})
    both = asked("mine,other")
    made = MadeUpRuns(both.plans(), lambda run: 2.0 + 0.01 * (run.seed % 50) - (0.1 if run.arm == "two" else 0.0))
    everything: dict[str, Any] = {"device": HERE, "console": Console(quiet=True)}
    suite.reproduce(both, start=made, **everything)
    dense, mixture = made.started[:2]
    shutil.rmtree(both.out / "runs" / mixture.hash)
    shutil.rmtree(both.out / "runs" / dense.hash / "checkpoints")
    shutil.rmtree(mixture.config.init_from or "")
    mine, other = suite.reproduce(both, start=made, **everything)
    assert other.verdict == "supported"
    lost = f"runs/{dense.hash} has no checkpoint any more: remove the folder, and it is made again"
    assert mine.reasons[1:] == [f"{mixture.label} cannot begin: {lost}"]
    shutil.rmtree(both.out / "runs" / dense.hash)
    mine, _ = suite.reproduce(both, start=made, **everything)
    assert mine.reasons == []


def test_an_arm_of_the_same_model_starts_from_the_run_itself(
    asked: Make, claim_dir: Make, upcycled: list[tuple[Path, Path]]
) -> None:
    arms = {"first": {"overrides": []}, "again": {"overrides": [], "starts_from": "first"}}
    claim_dir(arms=arms, comparisons=[COMPARISON | {"arm": "again", "against": "first"}])
    (plan,) = asked().plans()
    made = MadeUpRuns([plan], loss_of)
    judged(asked(), made)
    first, again = made.started[:2]
    assert Path(again.config.init_from or "").absolute() == asked().out / "runs" / first.hash
    assert not upcycled


@pytest.mark.parametrize(
    ("arms", "says"),
    [
        ({"upcycled": ARMS["upcycled"] | {"starts_from": "nobody"}}, "there is no arm nobody"),
        (
            {"upcycled": ARMS["upcycled"] | {"starts_from": "scratch"}},
            "starts_from=scratch rests on another arm itself",
        ),
        ({"dense": ARMS["dense"] | {"starts_from": "dense"}}, "starts_from=dense rests on another arm itself"),
        ({"dense": ARMS["dense"] | {"flops_of": "scratch"}}, "flops_of=scratch rests on another arm itself"),
        ({"upcycled": {"overrides": [], "starts_from": "dense"}}, "arm upcycled: starts_from=dense: the dense FFN of"),
        (
            {
                "upcycled": {"overrides": [WHOLE, "model.hidden_size=64"], "starts_from": "dense"},
                "scratch": {"overrides": [WHOLE, "model.hidden_size=64"]},
            },
            "give the mixture the sizes of the dense model",
        ),
        (
            {
                "dense": {"overrides": ["model.moe.num_experts=4"], "seed_offset": 50},
            },
            "starts_from=dense is of another shape in",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_started_from_is_refused_before_any_run(
    arms: dict[str, Any], says: str, asked: Make, claim_dir: Make
) -> None:
    claim_dir(**CLAIM | {"arms": ARMS | arms})
    with pytest.raises(UserError) as error:
        asked().plans()
    assert says in str(error.value)
    assert "mine" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("without", "key"), [("dense", "starts_from"), ("upcycled", "flops_of")])
def test_a_scale_cannot_leave_out_what_an_arm_rests_on(without: str, key: str, asked: Make, claim_dir: Make) -> None:
    scale = {"overrides": [], "tokens": [2560], "seeds": 3, "without": [without]}
    claim_dir(**CLAIM, scales={"cpu": scale})
    with pytest.raises(UserError, match=rf"without leaves out arm {without}, which arm \w+ needs \({key}\)"):
        asked().plans()


def test_an_arm_comes_after_the_one_it_starts_from(asked: Make, claim_dir: Make) -> None:
    turned = {name: ARMS[name] for name in ("upcycled", "dense", "scratch")}
    path = claim_dir(**CLAIM) / "claim/mine.yaml"
    import yaml

    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"arms": turned}, sort_keys=False))
    with pytest.raises(UserError, match="write arm dense above arm upcycled"):
        asked().plans()
