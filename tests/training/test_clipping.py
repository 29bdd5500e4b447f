"""Clipping as torch does it, or left to optimizers that can; who these are on a CPU: nobody."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState
from small_model import SMALL
from torch import nn

from moe_train.benchmark.arms import TrainingArm
from moe_train.compose import compose_run
from moe_train.training.clipping import all_take_coefficient
from moe_train.training.runtime import start_runtime

SETTINGS = ["model=nano", *SMALL, "data.sequence_length=16", "batch_size=4", "precision=fp32", "cuda_graphs=never"]


@pytest.fixture(autouse=True)
def _any_precision() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)  # the next test may want another


@pytest.mark.parametrize("max_norm", [0.1, 1e6, float("inf")])
def test_what_is_left_to_multiply_by_is_what_torch_multiplies_by(max_norm: float) -> None:
    config = compose_run(SETTINGS, "test", None)
    arm = TrainingArm(config, start_runtime(config))
    arm._stepper.passes(0, *arm.batches[0])
    parameters, spread = list(arm.model.parameters()), arm._stepper.spread
    before = [parameter.grad.clone() for parameter in parameters]

    norm, coefficient = spread.clip(max_norm, multiply=False)
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(parameters, before, strict=True))
    assert spread.clip(max_norm, multiply=True) == (norm, None)
    assert all(torch.equal(p.grad, grad * coefficient) for p, grad in zip(parameters, before, strict=True))
    assert (coefficient == 1) == (max_norm > 0.1)
    for parameter, grad in zip(parameters, before, strict=True):
        parameter.grad = grad.clone()
    assert norm == nn.utils.clip_grad_norm_(parameters, max_norm)


@pytest.mark.parametrize("settings", [["adamw"], ["muon"], ["adamw", "optimizer.moments=bfloat16"]], ids=str)
def test_gradients_are_multiplied_where_an_optimizer_does_not(settings: list[str]) -> None:
    name, *others = settings
    config = compose_run([*SETTINGS, f"optimizer={name}", *others], "test", None)
    arm = TrainingArm(config, start_runtime(config))
    by_kernels = arm.runtime.device_type == "cuda"
    assert all_take_coefficient(arm.optimizers) == by_kernels
    assert arm._stepper._multiplies == (not by_kernels)
    assert not all_take_coefficient([*arm.optimizers, torch.optim.SGD(arm.model.parameters())])
