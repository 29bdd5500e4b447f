"""The head's loss in C: against float64 and torch's operations, at any size, the same on any number of cores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from moe_train.kernels.cpu import head, library
from moe_train.model.loss import IGNORE, head_loss

Case = tuple[Tensor, Tensor, Tensor]  # hidden states (t, d), weight (v, d), targets (t)


pytestmark = pytest.mark.usefixtures("compiled_for_cpu")


def drawn(t: int, d: int, v: int) -> Case:
    """A seventh of the rows is padding."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(t, d, generator=generator)
    weight = torch.randn(v, d, generator=generator) * d**-0.5
    target = torch.randint(0, v, (t,), generator=generator)
    target[::7] = IGNORE
    return hidden, weight, target


def through(case: Case, kind: str, z: float = 0.0) -> list[Tensor]:
    """Objective, loss and the gradients of hidden states and weight."""
    hidden, weight, target = case
    leaves = [(x.double() if kind == "float64" else x).clone().requires_grad_() for x in (hidden, weight)]
    library.use("torch" if kind != "kernel" else "compiled", in_bf16=True)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind != "float64"):
            objective, nll = head_loss(leaves[0], leaves[1], target, z)
    finally:
        library.use("compiled", in_bf16=True)
    return [objective.detach(), nll, *torch.autograd.grad(objective, leaves)]


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm().clamp(min=1e-9)).item()


SIZES = {
    "tiny": (512, 256, 4096),
    "bytes": (1000, 128, 257),
    "more_chunks_than_two": (7000, 10, 2050),
    "no_multiples_of_a_register": (333, 46, 131),
    "fewest_rows": (64, 600, 1000),
    "wide_vocabulary": (70, 16, 30001),
    "smallest": (64, 2, 3),
}


@pytest.mark.parametrize("z", [0.0, 1e-2])
@pytest.mark.parametrize("name", SIZES)
def test_gradients_are_as_near_to_float64_as_torchs_and_losses_exact_but_for_rounded_operands(
    name: str, z: float
) -> None:
    case = drawn(*SIZES[name])
    exact, torchs, found = (through(case, kind, z) for kind in ("float64", "torch", "kernel"))
    assert not torch.equal(found[3], torchs[3])
    for each, other in zip(found, torchs, strict=True):
        assert each.dtype == other.dtype
        assert each.shape == other.shape
    for each, other, right in zip(found[2:], torchs[2:], exact[2:], strict=True):
        assert error(each, right) <= (1.05 + right.numel() ** -0.5) * error(other, right)
    hidden, weight, target = case
    rounded = through((hidden.bfloat16(), weight.bfloat16(), target), "float64", z)
    assert all(error(each, right) < 1e-6 for each, right in zip(found[:2], rounded[:2], strict=True))


@settings(max_examples=40, deadline=None)
@given(st.integers(64, 400), st.integers(1, 90), st.integers(1, 700), st.sampled_from([0.0, 1e-3, 0.1]))
def test_heads_of_any_vocabulary_and_even_width(t: int, half_d: int, v: int, z: float) -> None:
    case = drawn(t, 2 * half_d, v)
    exact, found = through(case, "float64", z), through(case, "kernel", z)
    for each, right in zip(found, exact, strict=True):
        assert error(each, right) < 0.01 + 0.04 * right.numel() ** -0.5 or v == 1  # one entry: losses are 0
    assert not found[2][case[2] == IGNORE].any()


def test_a_head_of_one_entry_costs_nothing() -> None:
    assert not any(each.any() for each in through(drawn(100, 8, 1), "kernel"))


def test_any_number_of_cores_gives_the_same_bits() -> None:
    case, before, found = drawn(*SIZES["more_chunks_than_two"]), torch.get_num_threads(), []
    try:
        for cores in (1, 2, 3, 5):
            torch.set_num_threads(cores)
            found.append(through(case, "kernel", 1e-3))
    finally:
        torch.set_num_threads(before)
    for each in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], each, strict=True))


@pytest.mark.parametrize("name", ["bytes", "more_chunks_than_two"])
def test_without_gradients_the_losses_are_the_same_and_nothing_else_is_made(name: str) -> None:
    case = drawn(*SIZES[name])
    with torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as counter:
        objective, nll = head_loss(*case, 1e-3)
    assert not objective.requires_grad
    assert torch.equal(torch.stack((objective, nll)), torch.stack(through(case, "kernel", 1e-3)[:2]))
    t, d, v = SIZES[name]
    assert counter.get_total_flops() == 2 * t * d * v


def test_three_products_are_counted_with_gradients() -> None:
    with FlopCounterMode(display=False) as counter:
        through(drawn(100, 8, 50), "kernel")
    assert counter.get_total_flops() == 3 * 2 * 100 * 8 * 50


def test_nothing_but_padding_costs_nothing() -> None:
    hidden, weight, target = drawn(100, 8, 50)
    assert not any(each.any() for each in through((hidden, weight, target.fill_(IGNORE)), "kernel", 0.1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_is_none_is_not_lost(value: float) -> None:
    hidden, weight, target = drawn(100, 8, 50)
    hidden[5, 3] = value
    objective, nll, grad_hidden, _ = through((hidden, weight, target), "kernel")
    assert not objective.isfinite()
    assert not nll.isfinite()
    assert grad_hidden[5].isnan().all()
    assert torch.cat((grad_hidden[:5], grad_hidden[6:])).isfinite().all()


def test_logits_that_exponentials_would_not_hold_are_shifted() -> None:
    hidden, weight, target = drawn(100, 8, 50)
    case = hidden * 1000, weight, target
    for each, right in zip(through(case, "kernel"), through(case, "float64"), strict=True):
        assert error(each, right) < 0.05


def test_tied_weights_and_hidden_states_in_bf16_keep_their_formats() -> None:
    hidden, weight, target = drawn(100, 8, 50)
    found = through((hidden.bfloat16(), weight, target), "kernel")
    assert [each.dtype for each in found] == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    exact = through((hidden.bfloat16(), weight, target), "float64")
    assert error(found[2], exact[2]) < 0.01
    tokens, tied = torch.arange(100) % 50, weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        head_loss(tied[tokens], tied, target)[0].backward()
    wide = weight.double().requires_grad_()
    head_loss(wide[tokens], wide, target)[0].backward()
    assert tied.grad is not None
    assert wide.grad is not None
    assert error(tied.grad, wide.grad) < 0.01


def test_what_is_not_for_it_is_left_to_torch() -> None:
    hidden, weight = torch.ones(64, 8), torch.ones(5, 8)
    assert head.takes(hidden, weight)
    assert not head.takes(hidden[:63], weight)
    assert not head.takes(hidden, weight.bfloat16())
    assert not head.takes(hidden, weight.double())
    assert not head.takes(hidden, weight[:, :6])
    assert not head.takes(hidden[:, :7], weight[:, :7])
    assert not head.takes(hidden.to("meta"), weight)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert not head.takes(hidden, distribute_tensor(weight, init_device_mesh("cpu", (1,)), [Shard(0)]))
    finally:
        torch.distributed.destroy_process_group()


def test_a_target_that_is_no_entry_is_refused() -> None:
    hidden, weight, target = drawn(100, 8, 50)
    target[3] = 50
    with pytest.raises(IndexError, match="target 50 is not one of the head's 50 entries"):
        through((hidden, weight, target), "kernel")


def test_targets_are_read_in_any_format_and_there_is_one_for_every_row() -> None:
    hidden, weight, target = drawn(100, 8, 50)
    found, expected = through((hidden, weight, target.int()), "kernel"), through((hidden, weight, target), "kernel")
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="100 rows have 100 targets"):
        through((hidden, weight, target[:90]), "kernel")
