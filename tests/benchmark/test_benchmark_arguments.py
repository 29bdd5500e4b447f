"""What the command refuses before anything is measured."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import ROOT

from moe_train.benchmark import results, suites
from moe_train.benchmark.bench import Bench
from moe_train.benchmark.ceilings import Ceilings
from moe_train.benchmark.figures import Figure, estimate, not_measured
from moe_train.errors import UserError, ended_by_signals, reported
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
        (["suite=step", "batchsize=4"], r"unknown argument batchsize=4: did you mean batch_size=\?"),
        (["suite=step", "num_thread=1"], r"unknown argument num_thread=1: did you mean num_threads=\?"),
        (
            ["suite=step", "stop.steps=3"],
            r"argument stop.steps=3: there are suite=.* and of train.py's settings model",
        ),
        (
            ["suite=step", "hardware=h100"],
            "argument hardware=h100: there are suite=.* and of train.py's settings model",
        ),
        (["suite="], "suite= is missing: choose from step"),
        (["suite=step", "json="], "json= names no file: give one"),
        (["suite=step", "json=/proc/x.json"], "the folder /proc cannot be written: choose another"),
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


def test_several_processes_are_refused_before_they_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "suite=step"])
    with pytest.raises(UserError, match="of one device: start it as one process"):
        script.main()


Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> Run:
    """The command with suites that are made up, in a folder without results; returns what it says on stderr.

    tax: steady, step: with quartiles far apart, startup: could not be measured, peer: fails, kernels: is interrupted.
    """
    ceilings = Ceilings("float32", estimate([0.1]), estimate([10.0]), {})

    def measured(suite: str, spread: tuple[float, float]) -> Callable[[Bench], list[Figure]]:
        return lambda bench: [Figure(suite, "speed", 1.0, "ratio", "tiny", spread, 3)]

    def fails(bench: Bench) -> list[Figure]:
        raise UserError("no such architecture")

    def waits(bench: Bench) -> list[Figure]:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError

    made_up = {"tax": measured("tax", (0.99, 1.01)), "step": measured("step", (0.8, 1.2)), "peer": fails}
    made_up |= {"startup": lambda bench: [not_measured("startup", "startup_seconds", "s", "there is no text")]}
    monkeypatch.setattr(suites, "_RUN", made_up | {"kernels": waits})
    monkeypatch.setattr(suites.ceilings, "measure", lambda *_, **__: ceilings)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments, "num_threads=1", "precision=fp32"])
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        ended = 0
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                with reported(), ended_by_signals():
                    script.main()
            except SystemExit as end:
                ended = int(str(end.code))
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
        assert ended == status, errors.getvalue()
        return errors.getvalue()

    return command


def suites_in(path: Path) -> list[str]:
    return [figure["suite"] for figure in json.loads(path.read_text())["figures"]]


def test_results_are_kept_beside_those_of_other_settings(run: Run, tmp_path: Path) -> None:
    assert run("suite=tax", "save=true") == ""
    run("suite=tax", "save=true", "model.moe.top_k=2")
    run("suite=tax", "save=true", "model.moe.top_k=2", "optimizer=muon")
    (file,) = (tmp_path / "results").glob("*.json")
    content = json.loads(file.read_text())
    assert [figure["of"] for figure in content["figures"]] == ["tiny", "tiny, with model.moe.top_k=2"]
    assert [made["of"] for made in content["runs"]] == [{"tax": [figure["of"]]} for figure in content["figures"]]


@pytest.mark.parametrize(
    ("last", "status", "line"),
    [
        ("peer", 1, "error: no such architecture; tax kept in x.json"),
        ("kernels", 143, "interrupted by SIGTERM: tax kept in x.json"),
    ],
)
def test_what_was_measured_before_a_suite_that_fails_or_is_interrupted_is_there(
    last: str, status: int, line: str, run: Run
) -> None:
    assert run(f"suite=tax,{last}", "json=x.json", status=status) == line + "\n"
    assert suites_in(Path("x.json")) == ["tax"]


def test_a_benchmark_that_is_interrupted_before_its_first_figure_says_that_nothing_is_kept(run: Run) -> None:
    assert run("suite=kernels", "json=x.json", status=143) == "interrupted by SIGTERM: no figures are kept\n"
    assert not Path("x.json").exists()


def test_unsteady_figures_are_marked_and_not_saved(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run("suite=step,tax", "json=x.json", "save=true", status=1)
    (file,) = (tmp_path / "results").glob("*.json")
    assert suites_in(file) == ["tax"]
    assert f"suite=step is not kept in {file}: speed: quartiles are 40% of it apart; measure again" in said
    marks = {each["suite"]: each["unsteady"] for each in json.loads(Path("x.json").read_text())["figures"]}
    assert marks == {"step": "quartiles are 40% of it apart", "tax": None}
    printed = capsys.readouterr().out
    assert "0.800 to 1.200, unsteady" in printed
    assert "note: suite=step: figures marked as unsteady say little" in printed


def test_figures_of_a_device_whose_speed_changed_meanwhile_are_not_saved(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([1.0, 0.8])
    monkeypatch.setattr(
        suites.ceilings,
        "measure",
        lambda *_, **__: Ceilings("float32", estimate([next(rates)]), estimate([1.0]), {}),
    )
    said = run("suite=tax", "save=true", status=1)
    assert "speed: the device multiplied at 1 TFLOP/s before it and at 0.8 after it" in said


def test_a_suite_of_which_nothing_could_be_measured_fails(run: Run, tmp_path: Path) -> None:
    said = run("suite=startup,tax", "data=text_files", "data.files=[/none/*.txt]", "json=x.json", "save=true", status=1)
    assert said == "error: suite=startup: nothing could be measured: there is no text\n"
    assert suites_in(Path("x.json")) == ["startup", "tax"]
    of = {figure["suite"]: figure["of"] for figure in json.loads(Path("x.json").read_text())["figures"]}
    settings = "data.files=[/none/*.txt] data=text_files"
    assert of == {"startup": f"with {settings} precision=fp32", "tax": f"tiny, with {settings}"}
    (file,) = (tmp_path / "results").glob("*.json")
    assert suites_in(file) == ["tax"]


def test_a_file_that_another_makes_meanwhile_is_left(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(bench: Bench) -> list[Figure]:
        Path("x.json").write_text("another's")
        return [Figure("tax", "speed", 1.0, "ratio")]

    monkeypatch.setitem(suites._RUN, "tax", other)
    said = run("suite=tax", "json=x.json", status=1)
    assert said == "error: json=x.json was made by somebody else meanwhile, and is left: choose another\n"
    assert Path("x.json").read_text() == "another's"
