"""Every claim plans at its scales, arms that claims share are the same runs, and mistakes are one line."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from moe_train.claims.library import load_claims
from moe_train.claims.plan import TUNING_SEED, Plan, make_plan
from moe_train.claims.statements import power_statements
from moe_train.claims.statistics import detectable
from moe_train.compose import CONFIGS
from moe_train.config.claim import MIN_BUDGETS, ScaleName
from moe_train.errors import UserError

NAMES = sorted(file.stem for file in (CONFIGS / "claim").glob("*.yaml"))


def plan(name: str, scale: Any) -> Plan:
    (claim,) = load_claims(name, scale, None)
    return make_plan(claim, scale, (), None)


@pytest.mark.parametrize("scale", ["smoke", "gpu"])  # scale=cpu has the arms of smoke
@pytest.mark.parametrize("name", NAMES)
def test_every_claim_plans(name: str, scale: Any) -> None:
    made = plan(name, scale)
    runs = made.runs(made.untuned())
    assert len({run.hash for run in runs}) == len(runs)
    seeds = [run.seed - made.arms[run.arm].seed_offset for run in runs]
    assert seeds == sorted(seeds)
    assert all(first.arm != second.arm for first, second in itertools.pairwise(runs))  # taking turns
    tuning = made.tuning_runs()
    per_arm = {name: sum(run.arm == name for run in tuning) for name in made.arms}
    assert len(set(per_arm.values())) <= 1  # an equal allowance
    assert all(run.seed >= TUNING_SEED for run in tuning)


def test_the_ten_claims_and_the_extras_are_there_at_every_scale() -> None:
    for scale in get_args(ScaleName):
        claims = load_claims("all", scale, None)
        assert [claim.config.number for claim in claims][:10] == list(range(1, 11))
        assert {claim.name for claim in claims} == set(NAMES)
        for claim in claims:
            if any("to_target" in c.measure for c in claim.config.comparisons):
                assert len(claim.config.scales[scale].tokens) >= MIN_BUDGETS


def test_the_margins_are_those_of_the_protocol() -> None:
    found = {}
    for claim in load_claims("all", "cpu", None):
        test = claim.config.comparisons[0].test
        found[claim.config.number or claim.name] = (test.kind, test.margin)
    assert found[1] == ("ratio_above", 1.5)
    assert found[3] == ("superiority", 0.01)
    assert found[4] == found[9] == found[10] == ("tost", 0.01)
    assert found[5] == ("below", 0.1)
    assert found[7] == ("tost", 0.0025)
    assert found[8] == ("tost", 0.003)


def test_claims_share_the_runs_of_the_arms_they_share() -> None:
    first, second = plan("sparse_saves_flops", "smoke"), plan("sparse_saves_dollars", "smoke")
    assert {run.hash for run in first.runs(first.untuned())} == {run.hash for run in second.runs(second.untuned())}


def test_a_run_is_named_by_the_configuration_that_its_command_line_makes(
    plan_of: Callable[..., Plan], compose_run: Callable[..., Any]
) -> None:
    for run in plan_of().runs({"one": 0.002, "two": 0.004}):
        assert compose_run(*run.overrides).config_hash() == run.hash


def test_an_arm_matched_by_flops_trains_longer_for_as_many(plan_of: Callable[..., Plan]) -> None:
    arms = {"mtp": {"overrides": ["model/mtp=depth_1"]}, "plain": {"overrides": [], "flops_of": "mtp"}}
    comparison = {"arm": "mtp", "against": "plain", "measure": "val_loss", "test": {"kind": "tost", "margin": 0.1}}
    made = plan_of(arms=arms, varies=["model.mtp"], comparisons=[comparison])
    mtp, plain = made.runs(made.untuned())[:2]
    assert plain.tokens > mtp.tokens
    assert plain.flops == pytest.approx(mtp.flops, rel=1e-3)


def test_the_power_of_an_unpaired_comparison_is_that_of_two_arms_that_scatter(plan_of: Callable[..., Plan]) -> None:
    """Of a difference of two means both scatter: as a pair would that scatters by the root of two more."""
    arms = {"one": {"overrides": ["model.moe.top_k=1"]}, "two": {"overrides": [], "seed_offset": 100}}
    test = {"kind": "superiority", "margin": 0.0}
    comparison = {"arm": "two", "against": "one", "measure": "val_loss", "paired": False, "test": test}
    made = plan_of(arms=arms, comparisons=[comparison], sigma=0.01)
    ((_, sees),) = power_statements(made)
    assert f"see an effect {detectable(0.01 * 2**0.5, 3, 0.05):.2g} beyond its bound" in sees


COMPARISON: dict[str, Any] = {
    "arm": "two",
    "against": "one",
    "measure": "val_loss",
    "test": {"kind": "superiority", "margin": 0.01},
}
SMOKE: dict[str, Any] = {"overrides": [], "tokens": [2560], "seeds": 3}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"comparisons": [COMPARISON | {"arm": "three"}]}, "there is no arm three: there are one, two"),
        ({"varies": []}, "differ in model.moe.top_k (2 and 1), which the claim does not say"),
        (
            {"arms": {"one": {"overrides": ["model.moe.top_k=1", "num_threads=2"]}, "two": {"overrides": []}}},
            "arms two and one differ in num_threads (None and 2), which the claim does not say",
        ),
        (
            {"arms": {"one": {"overrides": ["model.moe.top_k=1", "tracking=wandb"]}, "two": {"overrides": []}}},
            "arm one sets tracking itself (tracking=wandb): leave it out of the command",
        ),
        (
            {
                "arms": {"one": {"overrides": ["data.tokenizer=bpe"]}, "two": {"overrides": ["data.tokenizer=bytes"]}},
                "varies": ["data"],
            },
            "differ in data.tokenizer (bytes and bpe), and losses on other text cannot be compared",
        ),
        (
            {"arms": {"one": {"overrides": ["eval.max_tokens=4096"]}, "two": {"overrides": []}}, "varies": ["eval"]},
            "and losses on other text cannot be compared: make them equal",
        ),
        ({"scales": {"smoke": SMOKE | {"seeds": 1}}}, "scales.smoke.seeds=1 is too few for a test: give at least 2"),
        ({"scales": {"cpu": SMOKE | {"seeds": 2}}}, "scales.cpu.seeds=2 is too few for a test: give at least 3"),
        ({"scales": {"smoke": SMOKE | {"tokens": [256]}}}, "2 steps of arm one, and a schedule needs 10: raise tokens"),
        ({"scales": {"smoke": SMOKE | {"tokens": [2560, 2560]}}}, "budgets ascend, each once"),
        ({"scales": {"smoke": SMOKE | {"without": ["two"]}}}, "leaves no comparison that decides"),
        ({"equal": {"total_params": 0.0, "active_params": 0.01}}, "active_params of arms two and one are"),
        ({"equal": {"params": 0.0}}, "equal.params is unknown: choose from total_params"),
        ({"arms": {"one": {"overrides": ["seed=3"]}, "two": {"overrides": []}}}, "seed=3 is set by the suite itself"),
        (
            {"arms": {"one": {"overrides": ["model.moe.nexperts=3"]}, "two": {"overrides": []}}},
            "unknown key model.moe.n",
        ),
        ({"arms": {"one": {"overrides": [], "seed_offset": 5}, "two": {"overrides": []}}}, "say paired: false"),
        ({"arms": {"o e": {"overrides": []}, "two": {"overrides": []}}}, "arm o e: use letters, digits and _"),
        ({"marg": 1}, "unknown key marg"),
        (
            {"comparisons": [COMPARISON | {"test": {"kind": "tost", "margin": 0.0}}]},
            "margin=0 of kind=tost must be",
        ),
        (
            {"comparisons": [COMPARISON | {"test": {"kind": "superiority", "margin": -1.0}}]},
            "kind=non_inferiority allows",
        ),
        ({"comparisons": [COMPARISON | {"against": None}]}, "needs against=ARM"),
        ({"comparisons": [COMPARISON | {"decides": False}]}, "no comparison decides"),
        (
            {"comparisons": [COMPARISON | {"measure": "usd_to_target"}]},
            "measure=usd_to_target is a ratio of costs: take kind=ratio_above",
        ),
        (
            {
                "comparisons": [
                    COMPARISON | {"measure": "usd_to_target", "test": {"kind": "ratio_above", "margin": 1.0}}
                ]
            },
            "tokens has 1 budgets, too few for a curve: give 4",
        ),
        (
            {"scales": {"smoke": SMOKE | {"tuning": {"factors": [1.0], "tokens": 2560}}}},
            "factors",
        ),
        ({"sigma": -0.01}, "sigma=-0.01"),
        ({"sigma": 0.0}, "sigma=0"),
        ({"comparisons": [COMPARISON | {"measure": "loss"}]}, 'measure="loss": input should be'),
        ({"comparisons": [COMPARISON | {"test": {"kind": "ttest", "margin": 0.0}}]}, 'kind="ttest": input should be'),
        ({"comparisons": [COMPARISON | {"test": {"kind": "tost", "margin": 0.01, "alpha": 0.9}}]}, "alpha=0.9"),
        ({"comparisons": [COMPARISON | {"against": "two"}]}, "arm two is held against itself"),
        ({"comparisons": [COMPARISON, COMPARISON]}, "two against one in val_loss is there twice"),
        (
            {"comparisons": [COMPARISON | {"test": {"kind": "ratio_above", "margin": 1.0, "relative": True}}]},
            "relative: true of arm two is for differences",
        ),
        (
            {
                "comparisons": [
                    COMPARISON
                    | {"measure": "usd_to_target", "paired": False, "test": {"kind": "ratio_above", "margin": 1.0}}
                ]
            },
            "draws seeds in pairs: leave out paired",
        ),
        (
            {"arms": {"one": {"overrides": []}, "two": {"overrides": []}}},
            "are the same runs, and would differ in nothing",
        ),
        ({"scales": {"smoke": SMOKE | {"seeds": 10**6}}}, "seeds=1000000"),
        ({"scales": {"smoke": SMOKE | {"without": ["three"]}}}, "there is no arm three"),
        ({"scales": {"huge": SMOKE}}, "huge"),
        ({"statement": "  "}, "statement is empty"),
        ({"published": "one\ntwo"}, "published has several lines"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_claim_is_one_line(
    changes: dict[str, Any], says: str, plan_of: Callable[..., Plan]
) -> None:
    with pytest.raises(UserError) as error:
        plan_of(**changes)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert "mine" in str(error.value)  # which claim


@pytest.mark.parametrize(
    ("names", "scale", "says"),
    [
        ("sparse_saves_flop", "smoke", "there is no claim=sparse_saves_flop: did you mean sparse_saves_flops?"),
        ("xyz", "smoke", "choose from batch_balancing, bf16_moments"),
        ("mine", "gpu", "claim=mine has no scale=gpu: choose from smoke, cpu"),
    ],
)
def test_a_claim_or_scale_that_is_not_there(names: str, scale: Any, says: str, claim_dir: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="claim=") as error:
        load_claims(names, scale, claim_dir())
    assert says in str(error.value)


def test_a_file_that_is_no_claim_is_named(tmp_path: Path) -> None:
    (tmp_path / "claim").mkdir()
    (tmp_path / "claim/bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"bad\.yaml is no YAML"):
        load_claims("bad", "smoke", tmp_path)
    with pytest.raises(UserError, match="there is no such folder"):
        load_claims("bad", "smoke", tmp_path / "nowhere")
