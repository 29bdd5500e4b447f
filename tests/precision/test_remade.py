"""What is made again in the backward pass: same numbers, less kept, each thing made once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_train.model.transformer import Transformer
from moe_train.precision import remade as here
from moe_train.precision.remade import remade, remade_with, remaking

SmallModel = Callable[..., Transformer]


class Doubling:
    """Counts how often it is called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 2


def test_a_result_is_let_go_and_made_once_for_all_that_read_it() -> None:
    x, first, second = (torch.randn(8, 8, requires_grad=True) for _ in range(3))
    double = Doubling()
    with remaking(True):
        twice = remade(double, x)
        storage = torch.multiprocessing.reductions.StorageWeakRef(twice.untyped_storage())
        y = (twice @ first).sum() + (twice @ second).sum()
    del twice
    assert storage.expired()
    assert double.calls == 1
    y.backward()
    assert double.calls == 2
    for weight in (first, second):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, (2 * x).detach().t() @ torch.ones(8, 8))


def test_a_chain_is_made_again_from_its_beginning_each_link_once() -> None:
    x, weight, other = (torch.randn(8, 8, requires_grad=True) for _ in range(3))
    links = [Doubling() for _ in range(3)]
    with remaking(True):
        once = remade(links[0], x)
        both = [remade(link, once) for link in links[1:]]
        y = (both[0] @ weight).sum() + (both[1] @ other).sum() + (once @ other).sum()
    del once, both
    y.backward()
    assert [link.calls for link in links] == [2, 2, 2]
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, (4 * x).detach().t() @ torch.ones(8, 8))


def test_views_of_a_result_are_made_again_as_the_same_views() -> None:
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    with remaking(True):
        view = remade(Doubling(), x).t()[1:3, ::2]
        y = (view @ weight).sum()
    y.backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, (2 * x).detach().t()[1:3, ::2].t() @ torch.ones(2, 2))


def test_a_graph_can_be_walked_twice() -> None:
    x, weight = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    with remaking(True):
        y = (remade(Doubling(), x) @ weight).sum()
    once, again = (torch.autograd.grad(y, [x, weight], retain_graph=True) for _ in range(2))
    for mine, other in zip(once, again, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(("on", "gradients"), [(False, True), (True, False)])
def test_without_a_region_or_a_gradient_nothing_is_made_again(on: bool, gradients: bool) -> None:
    double = Doubling()
    x, weight = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    with torch.set_grad_enabled(gradients), remaking(on):
        assert here._region is None
        y = remade(double, x) @ weight
    if gradients:
        y.sum().backward()
    assert double.calls == 1


def test_an_error_within_leaves_no_region_behind() -> None:
    with pytest.raises(RuntimeError, match="on purpose"), remaking(True):
        raise RuntimeError("on purpose")
    assert here._region is None


@pytest.mark.parametrize("again", [True, False])
def test_what_is_rounded_is_made_again_only_where_its_input_is(again: bool) -> None:
    calls = 0

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return x.floor(), x - x.floor()

    x, weight = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    with remaking(True):
        source = remade(Doubling(), x) if again else x * 2
        whole, rest = remade_with(halves, source)
        y = (whole @ weight).sum() + (rest @ weight).sum()
    del source, whole, rest
    y.backward()
    assert calls == (2 if again else 1)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, (2 * x).detach().t() @ torch.ones(4, 4))


ARMS = [[], ["attention=gqa_4x32", "attention.qk_norm=per_head"], ["moe=switch"], ["mtp=depth_2"], ["q_lora_rank"]]


@pytest.mark.parametrize("arm", ARMS, ids=str)
@pytest.mark.parametrize("narrow", [False, True])
def test_a_models_gradients_are_the_same_to_the_last_bit(arm: list[str], narrow: bool, small_model: SmallModel) -> None:
    overrides = ["attention.q_lora_rank=12"] if arm == ["q_lora_rank"] else arm
    model = small_model(*overrides, dtype=torch.float32)
    tokens, targets = torch.randint(0, 64, (2, 2, 16), generator=torch.Generator().manual_seed(0))

    def gradients(region: bool) -> list[Tensor]:
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            if not region:
                patch.setattr("moe_train.model.transformer.remaking", lambda on: remaking(False))
            losses = model(tokens, targets, 0.3)
        return list(torch.autograd.grad(losses.objective, list(model.parameters()), allow_unused=True))

    for mine, plain in zip(gradients(True), gradients(False), strict=True):
        assert (mine is None and plain is None) or torch.equal(mine, plain)
