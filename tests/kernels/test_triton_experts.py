"""Routed experts from tokens to tokens, with Triton: against float64, and in a model as torch's operations have it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from kernel_checks import count_calls, error, floor

from moe_train.config import ModelConfig
from moe_train.kernels import experts, grouped_hopper
from moe_train.kernels.capability import of_capability
from moe_train.kernels.cpu import library
from moe_train.model import dispatch
from moe_train.model.experts import MoELayer
from moe_train.model.transformer import Transformer
from moe_train.precision import support
from moe_train.precision.matmul import swiglu_linear


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Have them taken, here too, or not."""

    def take(on: bool) -> None:
        monkeypatch.setattr(support, "runs_triton", lambda _: on)

    library.use("torch", in_bf16=True)
    return take


def by_rows(leaves: list[Tensor], plan: dispatch.Plan) -> Tensor:
    """Rows copied, each group through its expert, summed."""
    x, first, second, gate, added = leaves
    rows, start, made = x[plan.token_n], 0, []
    for e, end in enumerate(plan.ends_e.tolist()):
        g, u = (rows[start:end] @ first[e].mT).chunk(2, -1)
        made.append((torch.nn.functional.silu(g) * u * gate[start:end]) @ second[e].mT)
        start = end
    return torch.cat(made)[plan.place_tk].sum(1) + added


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("favourite", [False, True])
@pytest.mark.parametrize(("t", "e", "k", "d", "f"), [(70, 5, 2, 40, 24), (3, 7, 3, 16, 8), (150, 2, 1, 24, 72)])
def test_results_and_gradients_are_those_of_float64_rounded(
    dtype: torch.dtype,
    favourite: bool,
    t: int,
    e: int,
    k: int,
    d: int,
    f: int,
    random: Callable[..., Tensor],
    kernels: Callable[[bool], None],
) -> None:
    kernels(True)
    if random(1).device.type == "cuda":
        t, d, f = 50 * t, 16 * d, 16 * f
    scores = random(t, e) - (torch.arange(e, device=random(1).device) * 100 if favourite else 0)
    plan = dispatch.plan(scores.topk(k).indices, torch.ones(t, dtype=torch.bool, device=scores.device), e)
    inputs = [random(t, d, dtype=dtype), random(e, 2 * f, d) * d**-0.5, random(e, d, f) * f**-0.5]
    inputs += [random(t * k, 1).sigmoid(), random(t, d, dtype=dtype)]
    grad = random(t, 2 * d, dtype=dtype)[:, ::2]
    leaves = [each.clone().requires_grad_() for each in inputs]
    assert experts.takes(*leaves[:3])
    y = experts.RoutedExperts.apply(*leaves[:4], plan.ends_e, plan.token_n, plan.place_tk, leaves[4])
    found = [y.detach(), *torch.autograd.grad(y, leaves, grad)]
    exact_leaves = [each.double().requires_grad_() for each in inputs]
    exact_y = by_rows(exact_leaves, plan)
    exact = [exact_y.detach(), *torch.autograd.grad(exact_y, exact_leaves, grad.double())]
    assert [each.dtype for each in found] == [dtype, *(each.dtype for each in inputs)]
    for each, right in zip(found, exact, strict=True):
        assert error(each, right) <= floor(right)
    assert all((found[2][group] == 0).all() for group in range(e) if not (plan.counts_e[group]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_by_descriptors_give_what_the_others_give(
    dtype: torch.dtype,
    device: torch.device,
    random: Callable[..., Tensor],
    kernels: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("for compute capability 9.0")
    kernels(True)
    t, e, k, d, f = (120, 3, 2, 256, 144) if device.type == "cpu" else (5000, 16, 3, 512, 320)
    plan = dispatch.plan(random(t, e).topk(k).indices, torch.ones(t, dtype=torch.bool, device=device), e)
    inputs = [random(t, d, dtype=dtype), random(e, 2 * f, d) * d**-0.5, random(e, d, f) * f**-0.5]
    inputs += [random(t * k, 1).sigmoid(), random(t, d, dtype=dtype)]
    grad, made, found = random(t, d, dtype=dtype), list[str](), []
    count_calls(monkeypatch, grouped_hopper, ("product", "weight_product"), made)
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(grouped_hopper, "card", lambda _, c=capability: of_capability(c))
        leaves = [each.clone().requires_grad_() for each in inputs]
        y = experts.RoutedExperts.apply(*leaves[:4], plan.ends_e, plan.token_n, plan.place_tk, leaves[4])
        found.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
        assert bool(made) == (capability == (9, 0))
    for by_descriptors, otherwise in zip(found[1], found[0], strict=True):
        assert error(by_descriptors, otherwise.double()) <= floor(otherwise)
    # On a CPU those without an index are not Triton's.
    assert sorted(made) == ["product"] * (2 if device.type == "cpu" else 4) + ["weight_product"] * 2


def test_what_it_keeps_is_tokens_weights_and_what_swiglu_reads(
    random: Callable[..., Tensor], kernels: Callable[[bool], None]
) -> None:
    kernels(True)
    t, e, k, d, f = 40, 4, 2, 16, 24
    plan = dispatch.plan(random(t, e).topk(k).indices, torch.ones(t, dtype=torch.bool, device=random(1).device), e)
    leaves = [random(t, d, dtype=torch.bfloat16), random(e, 2 * f, d), random(e, d, f), random(t * k, 1)]
    leaves = [each.requires_grad_() for each in leaves]
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)  # type: ignore[func-returns-value]
    with hooks, FlopCounterMode(display=False) as forward:
        y = experts.RoutedExperts.apply(*leaves, plan.ends_e, plan.token_n, plan.place_tk, None)
    shapes = [tuple(each.shape) for each in kept if each.dtype.is_floating_point]
    assert shapes == [(t, d), (e, 2 * f, d), (e, d, f), (t * k, 1), (t * k, 2 * f)]
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert forward.get_total_flops() == 2 * t * k * 3 * d * f
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_sizes_and_formats_it_does_not_have_go_the_other_way(
    random: Callable[..., Tensor], kernels: Callable[[bool], None]
) -> None:
    x, first, second = random(4, 16, dtype=torch.bfloat16), random(2, 48, 16), random(2, 16, 24)
    kernels(True)
    assert experts.takes(x, first, second)
    assert experts.takes(x, first.bfloat16(), second.bfloat16())
    assert not experts.takes(x.float(), first, second)
    assert not experts.takes(x, first.half(), second)
    assert not experts.takes(x, random(2, 40, 16), random(2, 16, 20))
    assert not experts.takes(x[:, :12], first[..., :12], second[:, :12])
    kernels(False)
    assert not experts.takes(x, first, second)


@pytest.mark.parametrize("shared", [0, 2])
def test_a_layer_gives_the_same_with_it(
    shared: int,
    random: Callable[..., Tensor],
    kernels: Callable[[bool], None],
    model_config: Callable[..., ModelConfig],
) -> None:
    config = model_config("tiny", f"moe.num_shared_experts={shared}", "moe.moe_intermediate_size=16")
    assert config.moe is not None
    device = random(1).device
    layer = MoELayer(config.moe, hidden_size=32).to(device)
    for parameter in layer.parameters():
        parameter.data = random(*parameter.shape) * 0.3
    x, grad = random(2, 15, 32), random(2, 15, 32)
    found = []
    for on in (False, True):
        kernels(on)
        leaf = x.clone().requires_grad_()
        with torch.autocast(device.type, torch.bfloat16):
            y, routed = layer(leaf)
        found.append([y, routed.auxiliary_loss, *torch.autograd.grad(y, [leaf, *layer.parameters()], grad.to(y.dtype))])
        assert (type(y.grad_fn.next_functions[0][0]).__name__ == "RoutedExpertsBackward") == on
    for with_kernel, without in zip(found[1], found[0], strict=True):
        assert with_kernel.dtype == without.dtype
        assert error(with_kernel, without.double()) <= floor(without)


def test_a_model_recomputes_its_activations_to_the_same_bits(
    random: Callable[..., Tensor], kernels: Callable[[bool], None], small_model: Callable[..., Transformer]
) -> None:
    kernels(True)
    device = random(1).device
    model = small_model(dtype=torch.float32).to(device)
    tokens, targets = torch.randint(0, 64, (2, 2, 6), generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    for recompute in (False, True):
        model.activation_checkpointing = recompute
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            losses = model(tokens, targets, mtp_weight=0.3)
        losses.objective.backward()
        found.append([*losses, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert all(grad.isfinite().all() and grad.any() for grad in found[0][-8:])


def test_rows_that_came_from_elsewhere_go_through_the_same_products(
    random: Callable[..., Tensor], kernels: Callable[[bool], None]
) -> None:
    x, first, second = random(30, 16, dtype=torch.bfloat16), random(2, 48, 16), random(2, 16, 24)
    gate, ends_e = random(30, 1).sigmoid(), torch.tensor([12, 30], dtype=torch.int32, device=x.device)
    order = torch.arange(30, device=x.device)
    kernels(True)
    y = experts.RoutedExperts.apply(x, first, second, gate, ends_e, order, order.unsqueeze(1), None)
    kernels(False)
    with torch.autocast(x.device.type, torch.bfloat16):
        expected = swiglu_linear(x, first, second, row_weight=gate, ends_e=ends_e)
    assert error(y, expected.double()) <= floor(expected)
