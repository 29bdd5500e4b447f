"""A bench on the CPU of the tests, in FP32, on a model of a few thousand parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from accelerate.state import AcceleratorState
from small_model import SMALL

from moe_train.benchmark.bench import Bench, Effort
from moe_train.compose import compose_run
from moe_train.training.runtime import Runtime, start_runtime

TINY = (*SMALL, "data.vocab_size=320", "data.sequence_length=16", "batch_size=4", "precision=fp32", "num_threads=1")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    AcceleratorState._reset_state(True)
    yield start_runtime(compose_run(["model=nano", *TINY], "test"))
    AcceleratorState._reset_state(True)


@pytest.fixture
def bench(runtime: Runtime) -> Callable[..., Bench]:
    """With further settings of the user."""

    def make(*overrides: str) -> Bench:
        return Bench("test", (*TINY, *overrides), None, runtime, Effort(3, 0.0, 0.0))

    return make
