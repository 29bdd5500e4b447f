"""A run is on the device that it says it is on.

No GPU is needed: what accelerate is asked for is looked at, and what it would answer is made up.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_train.compose import compose_run
from moe_train.errors import UserError
from moe_train.training import runtime
from moe_train.training.runtime import Runtime, start_runtime


def start_where_a_gpu_is(monkeypatch: pytest.MonkeyPatch, taken: str) -> tuple[Runtime, dict[str, Any]]:
    """With an accelerate that takes device `taken`; returns what it was asked for too."""
    asked: dict[str, Any] = {}

    def accelerator(**settings: Any) -> SimpleNamespace:
        asked.update(settings, on_cpu_by_environment=os.environ.get("ACCELERATE_USE_CPU"))
        return SimpleNamespace(device=torch.device(taken), num_processes=1)

    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Made Up")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(runtime, "Accelerator", accelerator)
    return start_runtime(compose_run(["model=nano", "batch_size=2"], "test", None)), asked


def test_where_a_gpu_is_accelerate_is_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started, asked = start_where_a_gpu_is(monkeypatch, "cuda")
    assert asked["cpu"] is False
    assert asked["on_cpu_by_environment"] is None
    assert (started.device_type, started.device_name) == ("cuda", "NVIDIA Made Up")


def test_a_lone_process_of_several_that_were_asked_for_is_refused_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch --num_processes 2` makes of a machine with one GPU."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(UserError, match="several processes were asked for and accelerate started one"):
        start_where_a_gpu_is(monkeypatch, "cuda")


def test_accelerates_own_choice_of_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:1")
    with pytest.raises(UserError, match=r"ACCELERATE_TORCH_DEVICE=cuda:1: unset it, and .* CUDA_VISIBLE"):
        start_where_a_gpu_is(monkeypatch, "cuda:1")


def test_where_accelerate_takes_another_device_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="took cpu where NVIDIA Made Up is"):
        start_where_a_gpu_is(monkeypatch, "cpu")
