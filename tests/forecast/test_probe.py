"""A whole run put together from what a probe measured, and how near that came."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from moe_train.errors import UserError
from moe_train.forecast import probe
from moe_train.forecast.probe import compare, extrapolated

SUMMARY: dict[str, Any] = {
    "config_hash": "abc",
    "device_name": "a CPU",
    "hardware": "cpu",
    "num_devices": 2,
    "num_threads": 4,
    "total_params": 10,
    "active_params": 5,
    "flops_per_token": 30.0,
    "startup_seconds": 4.0,
    "train_seconds": 30.0,
    "evaluation_seconds": 5.0,
    "wall_seconds": 40.0,
    "price_usd_per_hour": 1.8,
    "usd_total": 0.04,
    "energy_kwh": None,
    "peak_memory_bytes": 1,
    "versions": {},
}
CONFIG = {"eval": {"every_tokens": 50_000}, "model": {"name": "nano"}}


def test_evaluations_between_a_probes_own_steps_are_no_longer_one() -> None:
    """With 25,000 tokens a step and one every 500,000, twenty steps have one of their own."""
    between = [row | ({"val/loss": 3.0} if index in (5, 11, 19) else {}) for index, row in enumerate(STEADY)]
    found = extrapolated(SUMMARY | {"evaluation_seconds": 15.0, "wall_seconds": 50.0}, between, CONFIG, tokens=150_000)
    alone = extrapolated(SUMMARY, STEADY, CONFIG, tokens=150_000)
    assert found["evaluation_seconds"] == alone["evaluation_seconds"] == 5.0
    assert found["wall_seconds"] == pytest.approx(alone["wall_seconds"])


def rows(seconds: list[float]) -> list[dict[str, Any]]:
    return [
        {"progress/tokens": 1000 * (step + 1), "throughput/step_seconds": taken} for step, taken in enumerate(seconds)
    ]


STEADY = rows([9.0] * 8 + [1.0] * 6 + [2.0] * 6)  # the first eight warm up


def test_a_run_is_start_up_its_tokens_at_the_warm_rate_its_evaluations_and_the_rest() -> None:
    found = extrapolated(SUMMARY, STEADY, CONFIG, tokens=150_000)
    per_token = (6 * 1.0 + 6 * 2.0) / 12_000
    evaluations = 3  # after 50,000 and 100,000 tokens, and at the end
    rest = 40.0 - 4.0 - 30.0 - 5.0
    assert found["wall_seconds"]["value"] == pytest.approx(4 + 150_000 * per_token + evaluations * 5.0 + rest)
    assert found["wall_seconds"]["low"] == pytest.approx(4 + 150 * 1.0 + evaluations * 5.0 + rest)
    assert found["wall_seconds"]["high"] == pytest.approx(4 + 150 * 2.0 + evaluations * 5.0 + rest)
    assert found["usd_total"]["value"] == pytest.approx(found["wall_seconds"]["value"] * 2 * 1.8 / 3600)
    assert found["tokens_per_second"]["value"] == pytest.approx(1 / per_token)
    assert found["energy_kwh"] is None


def test_a_run_too_short_to_measure_is_refused() -> None:
    with pytest.raises(UserError, match="too few to measure"):
        extrapolated(SUMMARY, STEADY[:10], CONFIG, tokens=1000)


class Made:
    """Starts of jobs that end at once; each takes a second less to start than the one before."""

    def __init__(self, failing: int | None = None) -> None:
        self.failing = failing
        self.steps: list[int] = []

    def __enter__(self) -> Made:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __call__(self, overrides: Sequence[str], output: IO[str], environment: Mapping[str, str]) -> Any:
        assert output.name.startswith(tempfile.gettempdir())
        steps = [o for o in overrides if o.startswith(("stop=", "stop.steps="))]
        self.steps.append(int(steps[-1].removeprefix("stop.steps=")) if len(steps) > 1 else probe.STEPS)
        if len(self.steps) - 1 == self.failing:
            output.write("error: it went wrong\n")
            return SimpleNamespace(pid=2**30, poll=lambda: 1)
        (folder,) = (Path(o.removeprefix("run_dir=")) for o in overrides if o.startswith("run_dir="))
        folder.mkdir()
        summary = SUMMARY | {"startup_seconds": 4.0 - len(self.steps)}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "config.yaml").write_text(json.dumps(CONFIG))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in STEADY))
        return SimpleNamespace(pid=2**30, poll=lambda: 0)


def test_of_a_pools_job_what_is_made_once_is_made_before(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made()
    monkeypatch.setattr(probe, "WarmStarts", lambda: made)
    assert probe.probe_of_job([], 150_000)["startup_seconds"] == 2.0  # the second's
    assert made.steps == [1, probe.STEPS]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_job_that_fails_is_said_with_its_last_words(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "WarmStarts", lambda: Made(failing))
    with pytest.raises(UserError, match="exit status 1: it went wrong"):
        probe.probe_of_job([], 150_000)


def finished(folder: Path, **changes: Any) -> Path:
    content = {"status": "finished", "tokens": 150_000, "wall_seconds": 250.0, "usd_total": None} | changes
    (folder / "summary.json").write_text(json.dumps({"tokens_per_second": 500.0} | content))
    return folder


def test_nearness_is_the_forecast_over_what_it_took(tmp_path: Path) -> None:
    forecast = extrapolated(SUMMARY, STEADY, CONFIG, tokens=150_000)
    found = compare(forecast, finished(tmp_path))
    assert found["wall_seconds"]["ratio"] == pytest.approx(forecast["wall_seconds"]["value"] / 250)
    assert found["wall_seconds"]["held"] is True
    assert compare(forecast, finished(tmp_path, wall_seconds=10.0))["wall_seconds"]["held"] is False
    assert found["usd_total"] is None


@pytest.mark.parametrize("changes", [{"status": "failed"}, {"tokens": 10}])
def test_another_run_is_no_test_of_a_forecast(changes: dict[str, Any], tmp_path: Path) -> None:
    forecast = extrapolated(SUMMARY, STEADY, CONFIG, tokens=150_000)
    with pytest.raises(UserError, match="give a finished run of as many"):
        compare(forecast, finished(tmp_path, **changes))
    with pytest.raises(UserError, match="holds no finished run"):
        compare(forecast, tmp_path / "nowhere")
