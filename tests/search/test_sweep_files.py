"""Search spaces as files: those of the project are whole, and what makes no sense is refused before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_up_searches import RATE, asked, config

from moe_train.compose import CONFIGS, compose_run
from moe_train.config.sweep import SweepConfig
from moe_train.errors import UserError
from moe_train.named_files import file_named, load_named, named_files
from moe_train.search import space
from moe_train.search.search import Asked

SEEDS = {"seed": {"kind": "choices", "choices": [5, 6]}}
NAMED_SEEDS = {"luck": {"kind": "named", "choices": {"a": ["seed=5"], "b": ["seed=6"]}}}
FILES = sorted((CONFIGS / "sweep").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_key_and_choice_of_the_ready_spaces_exists_and_makes_a_run(file: Path, tmp_path: Path) -> None:
    assert f"python scripts/sweep.py sweep={file.stem}" in file.read_text().splitlines()[0]
    found = load_named("sweep", file, SweepConfig)
    definitions = Asked(file.stem, found, str(file), tmp_path, tmp_path).definitions()
    assert len(definitions) == max(1, *(len(level.choices) for level in found.for_each.values()), 1)
    first = {key: space.choices_of(each)[0] for key, each in found.space.items()}
    hashes = set()
    for definition in definitions:
        overrides = [*definition.overrides, *space.overrides_of(found.space, first)]
        hashes.add(compose_run(overrides, "x").config_hash())
    assert len(hashes) == len(definitions)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"space": {}}, "space is empty: give it a key to search over"),
        ({"space": {"seed": {"kind": "choices", "choices": []}}}, "choices is empty: give values to choose from"),
        ({"space": {"seed": {"kind": "choices", "choices": [1, 1]}}}, "name each once"),
        ({"space": {"width": {"kind": "named", "choices": {}}}}, "choices is empty: give overrides"),
        ({"space": {"optimizer.lr": {"kind": "float", "low": 0.1, "high": 0.01}}}, "low=0.1 is not below high=0.01"),
        ({"space": {"optimizer.lr": {"kind": "float", "low": 0, "high": 0.01, "log": True}}}, "has no logarithm"),
        ({"space": {"optimizer.lr": {"kind": "float", "low": "1e-3", "high": 0.01}}}, 'low="1e-3"'),
        ({"space": {"optimizer.lr": {"kind": "flaot", "low": 0.1, "high": 0.2}}}, "flaot"),
        ({"space": {"optimizer.lr": {"kind": "float", "low": 0.1, "hihg": 0.2}}}, "hihg: did you mean high?"),
        ({"space": {"seed": {"kind": "int", "low": 1, "high": 10, "step": 4}}}, "high=10 is no whole number of step=4"),
        ({"trials": ...}, "trials is missing"),
        ({"trails": 3}, "unknown key trails"),
        ({"sampler": "grid", "trials": ...}, "optimizer.lr is a range: give choices"),
        ({"objectives": ["val_bits_per_byte", "val_bits_per_byte"]}, "name each once"),
        ({"objectives": []}, "objectives"),
        ({"objectives": ["bits"]}, "bits"),
        (
            {"objectives": ["usd_total"], "pruning": {"kind": "median", "every_tokens": 10}},
            "pruning looks at validation losses",
        ),
        ({"rule": {"x": "active_params", "y": "optimizer.lr"}}, "rule is fitted over the studies of for_each"),
        (
            {"for_each": {"seed": {"kind": "choices", "choices": [1, 2]}}, "rule": {"x": "size", "y": "optimizer.lr"}},
            "rule.x=size is neither a key here nor one of active_params",
        ),
        ({"for_each": {"optimizer.lr": {"kind": "choices", "choices": [1, 2]}}}, "stands in space and in for_each"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_in_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        config(**changes)
    assert says in str(error.value)
    assert str(error.value).startswith("mine.yaml: ")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"space": {"model.moe.nexperts": RATE["optimizer.lr"]}}, "unknown key model.moe.nexperts: did you mean"),
        ({"space": {"model": {"kind": "choices", "choices": ["nano", "giant"]}}}, "there is no model=giant"),
        ({"base": ["model.hiden_size=3"]}, "unknown key model.hiden_size: did you mean model.hidden_size?"),
        ({"given": ("optimizer.lr=0.1",)}, "optimizer.lr is searched over by mine.yaml: leave optimizer.lr= out"),
        ({"space": {"run_dir": {"kind": "choices", "choices": ["a", "b"]}}}, "space.run_dir is set by the search"),
        ({"base": ["run_dir=mine"]}, "mine.yaml: run_dir is set by the search"),
        ({"given": ("++budget.usd=1",)}, "budget.usd= is set by the search itself: leave it out"),
        ({"given": ("seed=1",), "space": NAMED_SEEDS}, "seed is searched over by mine.yaml: leave seed= out"),
        ({"given": ("seed=1",), "for_each": SEEDS}, "mine.yaml makes a study for each seed: leave seed= out"),
    ],
)
def test_a_key_that_does_not_exist_is_refused_before_a_run(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        asked(tmp_path, **changes).definitions()
    assert says in str(error.value)


def test_a_sweep_that_is_not_there_is_said_with_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no sweep=expert: did you mean experts\?"):
        file_named("sweep", "expert", named_files("sweep", None))
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/mine.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"mine\.yaml is no YAML"):
        load_named("sweep", named_files("sweep", tmp_path)["mine"], SweepConfig)


def test_suggestions_become_overrides_of_train() -> None:
    found = config(
        space={
            "optimizer.lr": RATE["optimizer.lr"],
            "model.moe": {"kind": "choices", "choices": [None]},
            "deterministic": {"kind": "choices", "choices": [True, False]},
            "tracking.project": {"kind": "choices", "choices": ["it's, here"]},
            "width": {"kind": "named", "choices": {"w64": ["model.hidden_size=64", "batch_size=8"]}},
        }
    ).space
    params = {
        "optimizer.lr": 0.012345678,
        "model.moe": None,
        "deterministic": True,
        "tracking.project": "it's, here",
        "width": "w64",
    }
    overrides = space.overrides_of(found, params)
    assert overrides[:3] == ["optimizer.lr=0.0123457", "model.moe=null", "deterministic=true"]
    assert overrides[4:] == ["model.hidden_size=64", "batch_size=8"]
    run = compose_run(overrides, "x")
    assert run.model.moe is None
    assert run.tracking.project == "it's, here"
