"""What single suites measure: the right product, the right share, the right command."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.benchmark import (
    choices,
    fp8_recipes,
    jobs,
    kernels,
    peer_if_there,
    profiling,
    smoke,
    startup,
    step,
    suites,
)
from moe_train.benchmark.bench import Bench, made_up_tokens
from moe_train.benchmark.ceilings import measure
from moe_train.benchmark.overhead import overhead_shares
from moe_train.compose import compose_run
from moe_train.errors import UserError
from moe_train.precision.choice import Device

CPU = torch.device("cpu")
SHAPE = kernels.Shape("test", rows=50, experts=4, inputs=8, outputs=6)


def test_suites_are_chosen_by_name() -> None:
    assert choices.chosen("step,tax,step") == ["step", "tax"]
    assert "smoke" not in choices.chosen("all")
    assert len(choices.chosen("all")) == len(choices.SUITES) - 1
    assert set(choices.SUITES) == set(suites._RUN)


@pytest.mark.parametrize("direction", kernels.DIRECTIONS)
@pytest.mark.parametrize("kernel", kernels.KERNELS, ids=lambda kernel: kernel.name)
def test_a_direction_of_a_kernel_is_that_product_alone(
    direction: str, kernel: kernels.Kernel, bench: Callable[..., Bench]
) -> None:
    precision = bench().config("model=nano", "precision=fp8_deepseek", without=["precision"]).precision
    made = kernels.call(kernel.make(precision, SHAPE, CPU), direction, SHAPE, CPU, torch.float32)
    result = made()
    found = result[0] if isinstance(result, tuple) else result
    shapes = {"forward": (50, 6), "input_gradient": (50, 8), "weight_gradient": (4, 6, 8)}
    assert isinstance(found, torch.Tensor)
    assert tuple(found.shape) == shapes[direction]
    made()  # can be repeated
    dense = kernels.dense(direction, SHAPE, CPU, torch.float32)()
    assert isinstance(dense, torch.Tensor)
    assert dense.shape == {"forward": (50, 6), "input_gradient": (50, 8), "weight_gradient": (6, 8)}[direction]


def test_rounding_is_timed_as_a_step_does_it(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the backend of the recipe, not by the operations that are its reference."""
    precision = bench().config("model=nano", "precision=fp8_deepseek", without=["precision"]).precision
    chosen = kernels.choose(precision, Device.of(CPU), {SHAPE.inputs, SHAPE.outputs})
    rounded: list[str] = []

    class Watched:
        name = "watched"

        def __getattr__(self, name: str) -> Any:
            rounded.append(name)
            return getattr(chosen.backend, name)

    monkeypatch.setattr(kernels, "choose", lambda *_: chosen._replace(backend=Watched()))
    figures = kernels._rounding(bench(), SHAPE, precision)
    assert {figure.name for figure in figures} == {"quantize_activation_share_of_copy", "quantize_weight_share_of_copy"}
    assert all(figure.of.endswith(", watched") for figure in figures)
    assert set(rounded) == {"quantize", "round_weights"}


def test_a_recipe_that_is_given_is_compared_with_all_its_settings(bench: Callable[..., Bench]) -> None:
    plain = bench()
    given = [override for override in plain.given if override != "precision=fp32"]
    asked = dataclasses.replace(plain, given=(*given, "precision=fp8_rowwise", "precision.backend=cublas"))
    figures = fp8_recipes.run(asked, "model=nano")
    (speedup,) = [figure for figure in figures if figure.name == "fp8_speedup"]
    assert speedup.note.endswith("backend cublas")


def test_groups_are_ragged_and_take_every_row() -> None:
    ends = kernels.ragged_ends(SHAPE, CPU)
    sizes = ends.diff(prepend=ends.new_zeros(1))
    assert ends[-1] == SHAPE.rows
    assert sizes.min() >= 0
    assert len(set(sizes.tolist())) > 1


def test_the_experts_of_a_model_have_two_products_and_a_gpu_wide_ones_too() -> None:
    config = compose_run(["model=tiny"], "test")
    gate_up, down = kernels.shapes(config, on_gpu=False)
    assert (gate_up.rows, gate_up.experts, gate_up.inputs, gate_up.outputs) == (4096 * 6, 64, 256, 192)
    assert (down.inputs, down.outputs) == (96, 256)
    assert kernels.shapes(config, on_gpu=True)[-1].inputs == 2048
    for model in ("dense_nano", "llama_3_1_8b"):
        with pytest.raises(UserError, match="has no experts"):
            kernels.shapes(compose_run([f"model={model}"], "test"), on_gpu=False)


def test_overhead_is_what_passed_and_was_no_step_and_what_steps_waited_for_data() -> None:
    def row(step: int, seconds: float, each: float, waited: float) -> dict[str, float]:
        return {
            "step": step,
            "progress/seconds": seconds,
            "throughput/step_seconds": each,
            "throughput/data_wait_fraction": waited,
        }

    rows = [row(10, 100.0, 9.0, 0.5), row(20, 110.0, 1.0, 0.0), row(30, 130.0, 1.0, 0.0), row(40, 140.0, 1.0, 0.1)]
    assert overhead_shares(rows) == pytest.approx([0.0, 0.5, 0.1])


def test_a_job_that_fails_gives_the_reason(bench: Callable[..., Bench], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.py ended with exit status 1: unknown key model.experts"):
        jobs.finished_job(["model.experts=3"], tmp_path, "a CPU")


def test_a_job_that_accelerate_sent_to_another_device_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(overrides: Sequence[str], output: object) -> int:
        run = Path(next(o for o in overrides if o.startswith("run_dir=")).removeprefix("run_dir="))
        run.mkdir()
        (run / "summary.json").write_text(json.dumps({"device_name": "AMD EPYC"}))
        return 0

    monkeypatch.setattr(jobs, "launch_job", made)
    assert jobs.finished_job([], tmp_path, "AMD EPYC").is_dir()
    with pytest.raises(UserError, match="made the run on AMD EPYC, and this is measured on NVIDIA Made Up: see what"):
        jobs.finished_job([], tmp_path, "NVIDIA Made Up")


def test_a_run_that_is_launched_finds_the_memory_of_a_gpu_free(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    def emptied() -> None:
        happened.append("emptied")

    def job(overrides: Sequence[str], folder: Path, device: str) -> Path:
        happened.append("launched")
        raise UserError("that is all")

    happened: list[str] = []
    on_gpu = dataclasses.replace(bench(), runtime=dataclasses.replace(bench().runtime, device_type="cuda"))
    monkeypatch.setattr(torch.cuda, "empty_cache", emptied)
    monkeypatch.setattr(startup, "finished_job", job)
    startup.run(on_gpu)
    assert happened[-2:] == ["emptied", "launched"]


def test_what_a_run_cannot_tell_is_not_measured(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(overrides: object, folder: Path, device: str) -> Path:
        raise UserError("no data")

    monkeypatch.setattr(startup, "finished_job", fails)
    monkeypatch.setattr("moe_train.benchmark.overhead.finished_job", fails)
    assert [(f.name, f.value, f.note) for f in startup.run(bench())] == [("startup_seconds", None, "no data")]
    figures = {figure.name: figure for figure in step.run(bench(), "model=nano")}
    assert figures["overhead_fraction"].note == "no data"
    assert figures["host_synchronizations"].value == 0
    rate = figures["tokens_per_second"].value
    assert rate is not None
    assert math.isfinite(rate)
    assert rate > 0


def test_start_up_is_the_runs_own_figure_without_the_first_launch_which_prepares_the_data(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = iter([60.0, 8.0, 10.0, 9.0])

    def job(overrides: Sequence[str], folder: Path, device: str) -> Path:
        assert "stop={steps: 1, tokens: null, flops: null, seconds: null, usd: null}" in overrides
        (tmp_path / "summary.json").write_text(json.dumps({"startup_seconds": next(clock)}))
        return tmp_path

    monkeypatch.setattr(startup, "finished_job", job)
    (figure,) = startup.run(bench())
    assert (figure.name, figure.value, figure.repetitions) == ("startup_seconds", 9.0, 3)


def test_ceilings_are_rates_above_zero() -> None:
    found = measure(CPU, torch.float32, [(8, 16, 32)], rounds=3)
    for rate in (found.matmul, found.copy, found.products["8 × 16 × 32"]):
        assert 0 < rate.low <= rate.value <= rate.high < math.inf


def test_made_up_tokens_are_the_same_each_time_and_as_uneven_as_text() -> None:
    config = compose_run(["model=nano"], "test")
    tokens = made_up_tokens(config, batches=2)
    assert (tokens == made_up_tokens(config, batches=2)).all()
    assert len(tokens) == 2 * 16 * 256 + 1
    assert tokens.max() < 4096
    assert (tokens < 64).mean() > 0.3


def test_a_profile_leaves_a_trace_and_the_slowest_operations(
    bench: Callable[..., Bench], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profiling.run(bench("model=nano"), tmp_path)
    assert (tmp_path / "trace.json").stat().st_size > 0
    assert "aten::mm" in (tmp_path / "operations.txt").read_text()
    said = " ".join(capsys.readouterr().out.split())
    assert "slowest operations" in said
    assert f", 1 thread, {date.today()}" in said


def test_without_transformers_the_peer_is_not_measured_and_the_rest_is(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    figures = peer_if_there.run(bench("model=nano"))
    assert [(figure.name, figure.value) for figure in figures] == [("peer_speedup", None), ("peak_memory_ratio", None)]
    assert "transformers cannot be imported (" in str(figures[0].note)
    assert suites._RUN["peer"] is peer_if_there.run
    assert smoke.peer_if_there is peer_if_there


def test_an_interrupted_benchmark_ends_the_run_that_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(BaseException):
        pass

    def asked(self: subprocess.Popen[str]) -> int:
        monkeypatch.undo()
        started.append(self)
        raise Asked

    started: list[subprocess.Popen[str]] = []
    monkeypatch.setattr(subprocess.Popen, "wait", asked)
    with pytest.raises(Asked):
        jobs.finished_job(["stop.steps=1000000"], tmp_path, "a CPU")
    assert started[0].returncode is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(started[0].pid, 0)
