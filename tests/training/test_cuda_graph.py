"""A step replayed as a CUDA graph is the step, to the bit; and where there can be no graph that is said."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_train.benchmark.arms import TrainingArm
from moe_train.compose import compose_run
from moe_train.errors import UserError
from moe_train.precision import recipes
from moe_train.training.cuda_graph import RatesOnDevice
from moe_train.training.muon import Muon
from moe_train.training.runtime import start_runtime

SMALL = ("model=nano", "batch_size=4", "data.sequence_length=128", "optimizer=adamw")
ARMS = {
    "mla": (),
    "gqa": ("model/attention=gqa_4x32",),
    "dense": ("model.dense_twin_of_moe=equal_flops",),
    "mtp": ("model/mtp=depth_1",),
    "micro-batches": ("micro_batch_size=2",),
    "checkpointing": ("activation_checkpointing=true",),
    "fp8": ("precision=fp8_deepseek",),
    "muon": ("optimizer=muon",),
    "moments in bf16": ("optimizer.moments=bfloat16",),
    "capacity": ("model.moe.capacity_factor=1.25",),
    "experts choose": ("model/moe=expert_choice",),
    "batch loss": ("model.moe.batch_loss_weight=0.01",),
}


def losses(settings: tuple[str, ...]) -> list[tuple[float, float]]:
    config = compose_run([*SMALL, *settings], "test", None)
    arm = TrainingArm(config, start_runtime(config))
    found = []
    for step in range(6):
        arm._stepper.step(step, *arm.batches[step % 4], 1.0, 0.0)
        figures = arm._stepper.read_totals()
        found.append((figures.loss, figures.grad_norm))
    assert arm._stepper.captures == (arm.runtime.cuda_graphs)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("settings", ARMS.values(), ids=ARMS)
def test_replayed_steps_are_the_steps(settings: tuple[str, ...]) -> None:
    replayed, launched = losses((*settings, "cuda_graphs=always")), losses((*settings, "cuda_graphs=never"))
    assert replayed == launched
    assert replayed[0] != replayed[-1]


def test_a_module_that_leaves_fp8_asks_for_another_graph_and_no_step_looks_through_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = compose_run([*SMALL, *ARMS["fp8"], "cuda_graphs=never"], "test", None)
    arm, keys = TrainingArm(config, start_runtime(config)), []

    class Captured:
        def __call__(self, key: Hashable, function: Callable[..., Any], *batch: torch.Tensor) -> Any:
            keys.append(key)
            return function(*batch)

    arm._stepper._captured_step = arm._stepper._captured_passes = Captured()

    def looks(model: torch.nn.Module) -> None:
        raise AssertionError("a step looks through all modules")

    monkeypatch.setattr(recipes, "_layers_of", looks)
    arm.step()
    arm.step()
    arm.forward_backward()
    recipes.to_compute_format(arm.model, ["blocks.1.attention.o_proj"])
    arm.step()
    arm.forward_backward()
    before, still, passes, after, passes_after = keys
    assert before == still != after
    assert passes != passes_after


def test_rates_on_the_device_are_the_groups_and_these_keep_plain_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    values, gradient = torch.randn(2, 8, 12, generator=generator)
    found = []
    for on_device in (False, True):
        parameter = torch.nn.Parameter(values.clone())
        parameter.grad = gradient.clone()
        muon = Muon([parameter], lr=0.02, momentum=0.9, nesterov=True, ns_steps=5, weight_decay=0.1)
        before = dict(muon.param_groups[0])
        muon.load_state_dict(muon.state_dict())  # which replaces the groups
        rates = RatesOnDevice([muon], torch.device("cpu"))
        rates.update()
        with rates.given() if on_device else contextlib.nullcontext():
            muon.step()
        found.append(parameter.detach())
        assert {k: v for k, v in muon.param_groups[0].items() if k != "params"} == {
            k: v for k, v in before.items() if k != "params"
        }
    torch.testing.assert_close(*found, rtol=0, atol=1e-7)
    assert not torch.equal(found[0], values)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_there_is_no_graph_and_asking_for_one_is_refused() -> None:
    config = compose_run([*SMALL, "cuda_graphs=auto"], "test", None)
    assert not TrainingArm(config, start_runtime(config))._stepper.captures
    with pytest.raises(UserError, match="cuda_graphs=always: there is no CUDA device; use auto or never"):
        start_runtime(compose_run([*SMALL, "cuda_graphs=always"], "test", None))


@pytest.mark.parametrize("caught_up", [True, False])
def test_a_gpu_waits_for_a_batch_only_where_it_has_nothing_left_to_do(
    caught_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose_run(SMALL, "test", None)
    stepper = TrainingArm(config, start_runtime(config))._stepper
    stepper.load(0)
    assert stepper.device_waited  # a CPU does whatever it is given at once
    stepper.runtime = SimpleNamespace(rank=0, world_size=1, device_type="cuda", device=torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(query=lambda: caught_up))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    stepper.load(1)
    assert stepper.device_waited is caught_up
