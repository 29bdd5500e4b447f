"""scripts/evaluate.py on a finished run: the figures of its summary, other texts, and tasks of the harness."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from command_line import ROOT, Commands

from moe_train.errors import UserError
from moe_train.evaluation.losses import evaluate_run

EVALUATE = ["python", str(ROOT / "scripts/evaluate.py")]


def evaluated(commands: Commands, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    commands.run(*EVALUATE, *arguments, f"json={file}")
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def test_the_validation_split_gives_the_figures_of_the_summary(finished: Commands, tmp_path: Path) -> None:
    summary, content = finished.summary("run"), evaluated(finished, tmp_path, "run=run")
    assert content["loss"] == pytest.approx(summary["val_loss"], abs=1e-6)
    assert content["bits_per_byte"] == pytest.approx(summary["val_bits_per_byte"], abs=1e-6)
    assert content["tokens"] == summary["val_tokens"]
    assert content["step"] == summary["steps"]
    assert content["checkpoint"].endswith(f"checkpoints/step_{summary['steps']}")
    assert content["compute_dtype"] == "float32"
    assert content["mtp_losses"] == []


def test_the_losses_of_mtp_modules_are_those_of_the_metrics(commands: Commands, tmp_path: Path) -> None:
    commands.train("model/mtp=depth_2", "run_dir=run")
    content, last = evaluated(commands, tmp_path, "run=run"), commands.metrics("run")[-1]
    assert content["mtp_losses"] == pytest.approx([last["val/mtp_loss_1"], last["val/mtp_loss_2"]], abs=1e-6)


@pytest.fixture
def here(finished: Commands, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The finished run, evaluated in this process."""
    monkeypatch.setenv("MOE_TRAIN_CACHE", finished.environment["MOE_TRAIN_CACHE"])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield finished.folder / "run"
    AcceleratorState._reset_state(reset_partial_state=True)  # the next test may want another precision


def test_the_training_split_and_files_of_the_same_text_agree(here: Path, text_corpus: Path, tmp_path: Path) -> None:
    train = evaluate_run(here, split="train", max_tokens=700)
    assert train["tokens"] == 700
    assert train["bytes"] == pytest.approx(700, abs=5)  # of the bytes tokenizer, less an end token or two
    lines = (text_corpus / "corpus.jsonl").read_text().splitlines(keepends=True)[:40]
    (tmp_path / "some.jsonl").write_text("".join(lines))
    everything = evaluate_run(here, files=f"{tmp_path}/*.jsonl", sequence_length=64)
    assert everything["sequence_length"] == 64
    assert everything["bytes"] == sum(len(json.loads(line)["text"].encode()) for line in lines)
    assert everything["loss"] == pytest.approx(train["loss"], rel=0.1)  # one kind of text throughout


def test_threads_and_kernels_are_the_runs_own_or_those_given(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = evaluate_run(here, max_tokens=100)
    assert (own["num_threads"], own["cpu_kernels"]) == (1, "torch")  # FP32, where there are no others
    monkeypatch.setattr("moe_train.training.compute.cores_here", lambda: 2)
    assert evaluate_run(here, max_tokens=100, num_threads=2)["num_threads"] == 2
    assert torch.get_num_threads() == 2
    with pytest.raises(UserError, match=r"cpu_kernels=compiled cannot be had: .*; use cpu_kernels=torch, or auto"):
        evaluate_run(here, cpu_kernels="compiled")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "float32, not in the FP8 of its training (fp8_tensorwise), as in_fp8=true would"),
        (["in_fp8=true"], "float32, linear layers in FP8 (fp8_tensorwise, emulated)"),
    ],
)
def test_it_says_what_the_loss_of_a_run_in_fp8_was_computed_in(
    in_fp8: Commands, arguments: list[str], says: str
) -> None:
    result = in_fp8.run(*EVALUATE, "run=run", "max_tokens=100", *arguments)
    assert says in " ".join(result.stdout.replace("│", " ").split())
    assert "num_threads=1, cpu_kernels=torch" in result.stdout


@pytest.fixture(scope="session")
def in_fp8(tmp_path_factory: pytest.TempPathFactory, text_corpus: Path, cache: Path) -> Commands:
    """A finished run in FP8, what is not FP8 in FP32, in `run`."""
    made = Commands(tmp_path_factory.mktemp("in_fp8"), text_corpus, cache)
    made.train("precision=fp8_tensorwise", "precision.compute_dtype=float32", "stop.steps=1", "run_dir=run")
    return made


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks on a local file: which of two words follows, and the bits of a text."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"ask": "the quick", "choices": [" brown", " zzzzz"], "right": 0}] * 4
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/words.jsonl\ntest_split: test\n"
    (folder / "next_word.yaml").write_text(
        f"task: next_word\n{dataset}output_type: multiple_choice\n"
        'doc_to_text: "{{ask}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: right\ntarget_delimiter: ""\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (folder / "bits.yaml").write_text(
        f"task: bits\n{dataset}output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{ask}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    return folder


def test_tasks_of_the_harness_run_on_the_exported_model(finished: Commands, task_folder: Path, tmp_path: Path) -> None:
    arguments = ["run=run", "harness=next_word,bits", f"include_path={task_folder}", "limit=3"]
    content = evaluated(finished, tmp_path, *arguments)
    assert content["tasks"]["next_word"]["acc"] == 1.0  # words of the corpus against none
    assert 0 < content["tasks"]["bits"]["bits_per_byte"] < 8


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["run=nowhere"], 1, "there is no such folder"),
        ([], 2, "run= is missing"),
        (["run=run", "split=test"], 2, "split=test: choose one of val, train"),
        (["run=run", "split=val", "files=x"], 2, "give one of them"),
        (["run=run", "limit=3"], 2, "add harness=TASK"),
        (["run=run", "harness=x", "max_tokens=3"], 2, "leave out harness="),
        (["run=run", "harness=x", "num_threads=3"], 2, "leave out harness="),
        (["run=run", "cpu_kernels=fast"], 2, "cpu_kernels=fast: choose one of auto, compiled, torch"),
        (["hf=.", "harness=x"], 1, "scripts/export_hf.py makes one"),
        (["run=run", "files=*.nothing"], 1, "no file matches"),
        (["run=run", "max_tokens=0"], 2, "max_tokens=0: give a number above 0, or give all"),
    ],
)
def test_mistakes_are_one_line_with_the_remedy(
    finished: Commands,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(finished.folder)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts/evaluate.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (status, 1), said
    assert message in said
