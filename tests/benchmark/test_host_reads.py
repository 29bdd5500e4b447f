"""Every way in which the host can read a tensor is found where it stands, and a step of ours has none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moe_train.benchmark.arms import TrainingArm
from moe_train.benchmark.bench import Bench
from moe_train.benchmark.host_reads import HostReads
from moe_train.model.norm import RMSNorm

READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "if": lambda x: 1 if x[0] > 0 else 2,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "assignment by mask": lambda x: x.clone().__setitem__(x > 2, torch.ones(2)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().bincount(),
    "equal": lambda x: torch.equal(x, x.clone()),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
}

DOES_NOT_READ: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: (x * 2 + 1).sum(),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "gather": lambda x: x[x.long() % 3],
    "repeat_interleave": lambda x: x.repeat_interleave(x.long(), output_size=10),
    "index_select": lambda x: x.index_select(0, x.long() % 3),
    "copy": lambda x: x.to(torch.bfloat16),
}


def places(run: Callable[[Tensor], object]) -> int:
    with HostReads() as reads:
        run(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    return sum(reads.places.values())


@pytest.mark.parametrize("kind", READS)
def test_a_read_is_counted_once(kind: str) -> None:
    assert places(READS[kind]) == 1


@pytest.mark.parametrize("kind", DOES_NOT_READ)
def test_what_a_device_can_do_alone_is_not_counted(kind: str) -> None:
    assert places(DOES_NOT_READ[kind]) == 0


def test_nothing_is_counted_outside() -> None:
    with HostReads() as reads:
        pass
    torch.ones(1).item()
    assert not reads.places


def test_a_read_in_a_backward_pass_is_counted() -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *grad_outputs: Tensor) -> Tensor:
            grad_outputs[0].sum().item()
            return grad_outputs[0]

    x = torch.ones(3, requires_grad=True)
    with HostReads() as reads:
        Reads.apply(x).sum().backward()
    assert list(reads.places) == ["test_host_reads.py:backward"]


EIGHT = ["model.moe.num_experts=8", "model.moe.top_k=2"]
ARMS = {
    "as it is": [],
    "AdamW": ["optimizer=adamw", "model.dropout=0.1"],
    "in micro-batches": ["micro_batch_size=2", "activation_checkpointing=true"],
    "two tokens ahead": ["model/mtp=depth_1"],
    "groups of experts": ["model/moe=group_limited", *EIGHT],
    "capacity": ["model/moe=gshard", *EIGHT],
    "experts that choose": ["model/moe=expert_choice", *EIGHT],
    "balanced over batches": ["model/moe=batch_loss", *EIGHT],
    "FP8": ["precision=fp8_deepseek", "precision.compute_dtype=float32"],
}


@pytest.mark.parametrize("arm", ARMS)
def test_a_step_reads_nothing(arm: str, bench: Callable[..., Bench]) -> None:
    """In code that a GPU runs too; the CPU's own grouped product does read where its groups end."""
    without = ["precision"] if arm == "FP8" else []
    trained = TrainingArm(bench().config("model=nano", *ARMS[arm], without=without), bench().runtime)
    trained.step()
    with HostReads() as reads:
        trained.step()
    assert reads.everywhere == {}
    assert all(place.startswith("cpu_") for place in reads.on_cpu_only)


def test_a_read_planted_in_a_model_is_found(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    arm = TrainingArm(bench().config("model=nano"), bench().runtime)
    plain = RMSNorm.forward

    def reading(self: nn.Module, x: Tensor) -> Tensor:
        assert x.mean().item() is not None
        return plain(self, x)

    monkeypatch.setattr(RMSNorm, "forward", reading)
    with HostReads() as reads:
        arm.step()
    assert sum(reads.everywhere.values()) > 0
