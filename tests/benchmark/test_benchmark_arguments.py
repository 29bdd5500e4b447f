"""What the command refuses before anything is measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from command_line import ROOT

from moe_train.benchmark import results, suites
from moe_train.benchmark.bench import Bench
from moe_train.benchmark.ceilings import Ceilings
from moe_train.benchmark.figures import Figure, estimate
from moe_train.errors import UserError
from moe_train.training.runtime import Runtime

spec = importlib.util.spec_from_file_location("benchmark_script", ROOT / "scripts" / "benchmark.py")
assert spec is not None
assert spec.loader is not None
script = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = script  # pydantic looks up its types there
spec.loader.exec_module(script)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "suite= is missing: choose from step"),
        (["suite=step,speed"], "suite=speed is unknown: choose from step, peer"),
        (["suite=step", "model=nonesuch"], "there is no model=nonesuch"),
        (["suite=step", "model.experts=3"], "unknown key model.experts"),
        (["suite=step", "modle=nano"], "unknown argument modle=nano"),
        (["suite=step", "stop.steps=3"], "unknown argument stop.steps=3"),
        (["suite=step", "rounds=2"], "rounds=2: give a number of at least 3"),
        (["suite=step", "compile=maybe"], "compile=maybe: choose true or false"),
        (["suite=step", "json=nowhere/x.json"], "there is no folder"),
        (["suite=step", "compile=true"], "give it with suite=peer"),
        (["suite=tax", "launch=false"], "give it with suite=step"),
        (["suite=step", "out=somewhere"], "out= is the folder of a profile"),
        (["profile=true", "save=true"], "give suite="),
        (["profile=true", "out=taken"], "out=taken is there already"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(UserError, match=message):
        script.main()


def test_results_are_kept_beside_those_of_other_suites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: Runtime
) -> None:
    def made_up(bench: Bench, names: Sequence[str]) -> results.Content:
        ceilings = Ceilings("float32", estimate([0.1]), estimate([10.0]), {})
        figures = [Figure(name, "speed", 1.0, "ratio") for name in names]
        return results.content_of(bench.runtime, names, ceilings, figures, load=None)

    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(suites, "run", made_up)
    for suite in ("tax", "step"):
        arguments = [f"suite={suite}", "save=true", "num_threads=1", "precision=fp32"]
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
        script.main()
    (file,) = (tmp_path / "results").iterdir()
    assert {figure["suite"] for figure in json.loads(file.read_text())["figures"]} == {"tax", "step"}
