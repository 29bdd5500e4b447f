"""What is asked for beside a GPU is done on the CPU by all parts of a command: none of them takes the GPU on its own.

No GPU is needed: torch is made to say that there is one, and whoever takes it fails.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
import torch

from moe_train import launch
from moe_train.config import RunConfig
from moe_train.describe import _built, _formats
from moe_train.gpu import takes_gpu
from moe_train.sweeps.devices import Devices, devices_here


@pytest.fixture(autouse=True, params=["1", "true", "yes"])
def _asked_for_the_cpu_beside_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", request.param)


def test_jobs_find_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not takes_gpu()
    assert devices_here() == Devices()
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    assert takes_gpu()
    assert devices_here() == Devices(("0",))


def test_a_job_sees_none_whatever_its_launcher_makes_of_the_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's launcher of one process sets ACCELERATE_USE_CPU to False."""
    environments = []

    def started(*_: object, env: dict[str, str], **settings: object) -> None:
        environments.append(env)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(subprocess, "Popen", started)
    launch.start_job([], None, {}, accelerate=True)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    launch.start_job([], None, {}, accelerate=True)
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == ["", "3"]


def test_formats_are_described_for_the_cpu(compose_run: Callable[..., RunConfig]) -> None:
    config = compose_run("model=nano", "precision=fp8_deepseek")
    rows = _formats(_built(config.model.resolved(), 320), config.precision, "float32")
    assert {row["backend"] for row in rows if "backend" in row} <= {"emulated", "triton"}
