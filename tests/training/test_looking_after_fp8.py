"""A run that looks after its FP8 layers: what it logs and on which steps, warnings, stops, modules that go back."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from command_line import TINY

from moe_train.config import RunConfig, to_dict
from moe_train.errors import UserError
from moe_train.evaluation.losses import evaluate_run
from moe_train.precision.health import Counts
from moe_train.training import parts
from moe_train.training import run as module
from moe_train.training.fp8_health import modules_in_compute_format

FP8 = ["precision=fp8_tensorwise", "precision.compute_dtype=float32"]
NONE_MAY = "precision.health.max_underflow_rate=0.0"


class Runs:
    """Runs in this process, on the tiny settings, in a folder of their own."""

    def __init__(self, folder: Path, settings: list[str], compose_run: Callable[..., RunConfig]) -> None:
        self.folder, self._settings, self._compose_run = folder, settings, compose_run

    def __call__(self, name: str, *overrides: str) -> list[dict[str, Any]]:
        AcceleratorState._reset_state(True)
        given = {override.split("=")[0] for override in overrides}
        settings = [setting for setting in self._settings if setting.split("=")[0] not in given]
        module.train(self._compose_run(*settings, f"run_dir={self.folder / name}", "resume=auto", *overrides))
        return self.rows(name)

    def failure(self, name: str, *overrides: str) -> str:
        try:
            self(name, *overrides)
        except UserError as error:
            text = str(error)
        gc.collect()  # the frames of the error hold the lock of the folder
        return text

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def losses(self, name: str) -> list[float]:
        return [row["train/loss"] for row in self.rows(name)]

    def summary(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / name / "summary.json").read_text())
        return found

    def formats(self, name: str) -> str:
        return (self.folder / name / "precision.json").read_text()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def runs(
    tmp_path: Path,
    text_corpus: Path,
    cache: Path,
    compose_run: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Runs]:
    monkeypatch.setenv("MOE_TRAIN_CACHE", str(cache))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    own = [f"data.files=[{text_corpus}/*.jsonl]", "cost.ledger=null", "eval.max_tokens=300", "stop.steps=4", *FP8]
    replaced = {setting.split("=")[0] for setting in own}
    yield Runs(tmp_path, [s for s in TINY if s.split("=")[0] not in replaced] + own, compose_run)
    AcceleratorState._reset_state(True)


def test_rates_are_logged_by_layer_and_losses_are_the_same_to_the_last_bit_without_them(runs: Runs) -> None:
    rows = runs("with")
    assert runs("without", "precision.health=null")[-1]["train/loss"] == rows[-1]["train/loss"]
    assert runs.losses("without") == runs.losses("with")
    assert not any(key.startswith("fp8/") and key.endswith("rate") for key in runs.rows("without")[0])
    for row in rows:
        by_layer = {key: value for key, value in row.items() if key.startswith(("fp8/blocks", "fp8/mtp"))}
        assert {key for key in by_layer if "attention.o_proj" in key} == {
            f"fp8/blocks.{block}.attention.o_proj/{rate}_rate"
            for block in (0, 1)
            for rate in ("underflow", "saturation", "nonfinite")
        }
        of_layers = [value for key, value in by_layer.items() if key.endswith("underflow_rate")]
        of_operands = [row[f"fp8/{operand}/underflow_rate"] for operand in ("input", "weight", "gradient")]
        assert row["fp8/underflow_rate"] == max(of_layers) == max(of_operands)
        assert row["fp8/saturation_rate"] == row["fp8/nonfinite_rate"] == row["fp8/modules_in_compute_format"] == 0


def test_only_steps_that_will_be_logged_are_counted(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    counting = Counts.counting
    monkeypatch.setattr(Counts, "counting", lambda counts: counted.append(1) or counting(counts))
    rows = runs("run", "tracking.log_every_steps=3", "checkpoint.every_steps=4", "stop.steps=7")
    assert [row["step"] for row in rows] == [3, 4, 6, 7]
    assert len(counted) == 4
    assert all("fp8/underflow_rate" in row for row in rows)


def test_micro_batches_and_recomputed_activations_are_counted_too(runs: Runs) -> None:
    rows = runs("run", "micro_batch_size=2", "activation_checkpointing=true", "model/mtp=depth_1", "stop.steps=2")
    assert 0 <= rows[0]["fp8/mtp.0.join_proj/underflow_rate"] <= rows[0]["fp8/underflow_rate"] < 0.1
    assert rows[0]["fp8/underflow_rate"] > 0


def test_a_warning_is_given_once_and_the_run_goes_on(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs("run", NONE_MAY)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "more than precision.health" in line]
    assert warnings[0].startswith("note: FP8 at step 1: the underflow_rate of the gradient of blocks.")
    assert len(warnings) < 4
    assert runs.summary("run")["status"] == "finished"


def test_a_stop_names_layer_rate_limit_and_remedy_and_nothing_is_lost(runs: Runs) -> None:
    settings = (NONE_MAY, "precision.health.action=stop")
    text = runs.failure("run", *settings)
    assert "FP8 at step 1: the underflow_rate of the gradient of blocks." in text
    assert "more than precision.health.max_underflow_rate=0 (step_1 is saved): go on with resume=auto and" in text
    assert "FP8 at step 2" in runs.failure("run", *settings)
    runs("run", "precision.health.max_underflow_rate=null")
    runs("whole")
    assert runs.losses("run") == runs.losses("whole")
    runs("another", *settings, "stop.steps=1")  # at its end there is nothing left to stop
    assert runs.summary("another")["status"] == "finished"


def test_modules_that_go_back_stay_there_and_a_resumed_run_ends_with_the_same_bits(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("precision.health.max_underflow_rate=3e-3", "precision.health.action=compute_format")
    runs("whole", *settings, "stop.steps=6")
    notes = [line for line in capsys.readouterr().err.splitlines() if "these modules run in float32" in line]
    modules = runs.summary("whole")["fp8_modules_in_compute_format"]
    rows = runs.rows("whole")
    assert len(modules) == rows[-1]["fp8/modules_in_compute_format"] > 0
    assert notes[0].startswith("note: FP8: from step 2 on these modules run in float32: blocks.")
    assert runs.summary("whole")["mixed_precision_utilization"] is None
    first = next(name for name in modules if name in notes[0] and name.endswith("proj"))
    assert rows[0][f"fp8/{first}/underflow_rate"] > 3e-3
    assert rows[1][f"fp8/{first}/underflow_rate"] is None
    narrow = runs("narrow", "stop.steps=6")
    assert runs.formats("whole") != runs.formats("narrow")
    assert rows[0]["train/loss"] == narrow[0]["train/loss"]
    assert rows[1]["train/loss"] != narrow[1]["train/loss"]

    runs("cut", *settings, "stop.steps=3", "schedule=constant")
    runs("cut", *settings, "stop.steps=6", "schedule=constant")
    runs("uncut", *settings, "stop.steps=6", "schedule=constant")
    assert runs.losses("cut") == runs.losses("uncut")
    assert (
        runs.summary("cut")["fp8_modules_in_compute_format"] == runs.summary("uncut")["fp8_modules_in_compute_format"]
    )
    assert any("went back to float32 earlier and stay there" in line for line in capsys.readouterr().err.splitlines())

    # Another recipe begins with all its layers, and says so; what ran in what before is kept.
    formats = runs.formats("cut")
    runs("cut", "precision=fp8_rowwise", "precision.compute_dtype=float32", "stop.steps=7", "schedule=constant")
    assert runs.summary("cut")["fp8_modules_in_compute_format"] == []
    assert '"but"' not in runs.formats("cut")
    said = capsys.readouterr().err
    assert "note: from here on another precision: precision=fp8_rowwise, before precision=fp8_tensorwise\n" in said
    assert f"and multiply in FP8 again: {', '.join(sorted(modules))}\n" in said
    assert formats in [path.read_text() for path in (runs.folder / "cut").glob("precision.*.json")]
    # Nor is the ideal time of its tokens known, as it is not of those before.
    assert runs.summary("cut")["mixed_precision_utilization"] is None


def test_a_checkpoint_from_before_a_setting_existed_has_the_same_recipe(compose_run: Callable[..., RunConfig]) -> None:
    precision = compose_run("precision=fp8_rowwise").precision
    assert precision.fp8 is not None
    recipe = to_dict(precision.fp8)
    del recipe["power_of_two_gradients_of"]
    state = {"fp8": {"recipe": recipe, "modules_in_compute_format": ["blocks.0.ffn"]}}
    assert modules_in_compute_format(state, precision) == ["blocks.0.ffn"]


def test_a_precision_that_cannot_be_had_leaves_the_run_as_it_was(runs: Runs) -> None:
    runs("run", "stop.steps=1")
    config = (runs.folder / "run/config.yaml").read_text()
    refused = runs.failure("run", "precision=fp8_deepseek", "precision.backend=cublas", "stop.steps=2")
    assert "precision.backend=cublas cannot do precision=fp8_deepseek here" in refused
    assert (runs.folder / "run/config.yaml").read_text() == config
    assert not list((runs.folder / "run").glob("config.*.yaml"))


def test_a_change_within_a_recipe_is_said_by_its_keys(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs("run", "stop.steps=1")
    assert "another precision" not in capsys.readouterr().err
    runs("run", "stop.steps=2", "precision.fp8.accumulation=hopper", "precision.evaluate_in_fp8=true")
    changed = "precision.fp8.accumulation, precision.evaluate_in_fp8"
    assert f"note: from here on another precision: {changed}\n" in capsys.readouterr().err


def test_an_evaluation_in_fp8_leaves_out_what_went_back(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    # Scales of tiles: an evaluation takes more sequences at once, with which scales of whole tensors are others.
    tiles = ("precision=fp8_deepseek", "precision.compute_dtype=float32")
    runs("run", *tiles, NONE_MAY, "precision.health.action=compute_format", "precision.evaluate_in_fp8=true")

    def evaluated() -> float:
        AcceleratorState._reset_state(True)
        return float(evaluate_run(runs.folder / "run")["loss"])

    expected = pytest.approx(runs.summary("run")["val_loss"], rel=1e-6)
    assert evaluated() == expected
    monkeypatch.setattr("moe_train.evaluation.losses.modules_in_compute_format", lambda *_: [])
    assert evaluated() != expected


def test_a_run_is_evaluated_in_fp8_or_not_whatever_multiplied_in_training(runs: Runs) -> None:
    runs("run", "precision=fp8_deepseek", "precision.compute_dtype=float32", "stop.steps=2")
    config = runs.folder / "run/config.yaml"
    config.write_text(config.read_text().replace("backend: auto", "backend: triton"))  # as trained on a GPU

    def evaluated(in_fp8: bool | None) -> dict[str, Any]:
        AcceleratorState._reset_state(True)
        return evaluate_run(runs.folder / "run", in_fp8=in_fp8)

    wide, narrow = evaluated(None), evaluated(True)
    assert wide["fp8"] is None
    assert wide["loss"] == pytest.approx(runs.summary("run")["val_loss"], rel=1e-6)
    assert narrow["fp8"] == "fp8_deepseek, emulated"
    assert narrow["loss"] != wide["loss"]
    assert narrow["loss"] == pytest.approx(wide["loss"], rel=0.01)
    runs("plain", "precision=fp32", "precision.compute_dtype=float32", "stop.steps=1")
    AcceleratorState._reset_state(True)
    with pytest.raises(UserError, match="has no recipe of FP8, its precision is fp32"):
        evaluate_run(runs.folder / "plain", in_fp8=True)


def test_a_loss_that_is_not_finite_says_in_which_layer_it_began(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    runs("run", "stop.steps=1")
    read = parts.read_weights_here

    def read_spoilt(source: Any, model: torch.nn.Module, spread: Any) -> None:
        read(source, model, spread)
        with torch.no_grad():
            model.get_parameter("blocks.1.attention.o_proj.weight")[0, 0] = float("inf")

    monkeypatch.setattr(parts, "read_weights_here", read_spoilt)
    text = runs.failure("run", "stop.steps=3")
    assert "in FP8 first the weight of blocks.1.attention.o_proj (step_1 is saved)" in text
