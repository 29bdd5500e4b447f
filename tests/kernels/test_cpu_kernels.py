"""Kernels in C: against float64 and torch's operations, the same on any number of cores, and NaN stays NaN."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_checks import allowed, drawn, error, floor
from small_model import MOE
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from moe_train.kernels.cpu import library, linear, router, routing
from moe_train.kernels.cpu.experts import SwiGLUOfTokens, takes
from moe_train.model import dispatch
from moe_train.model.router import Router
from moe_train.precision import matmul
from moe_train.training.muon import Muon

pytestmark = pytest.mark.usefixtures("compiled_for_cpu")


def layer(t: int, experts: int, k: int, d: int, f: int, favourite: bool = False) -> SimpleNamespace:
    """Tokens, weights, and where tokens go; `favourite`: all to the first experts."""
    scores = drawn(t, experts, seed=1)
    if favourite:
        scores -= torch.arange(experts) * 100
    plan = dispatch.plan(scores.topk(k).indices, torch.ones(t, dtype=torch.bool), experts)
    return SimpleNamespace(
        x=drawn(t, d, seed=2).bfloat16(),
        first=drawn(experts, 2 * f, d, seed=3, scale=d**-0.5),
        second=drawn(experts, d, f, seed=4, scale=f**-0.5),
        weight=drawn(t * k, 1, seed=5).sigmoid().bfloat16(),
        grad=drawn(t, d, seed=6).bfloat16(),
        plan=plan,
    )


def through(case: SimpleNamespace, kind: str) -> list[Tensor]:
    """Result and gradients of x, both weights and the rows' weights: in float64, by torch in BF16, by the kernels."""
    wide = [x.double() if kind == "float64" else x for x in (case.x, case.first, case.second, case.weight)]
    x, first, second, weight = leaves = [x.clone().requires_grad_() for x in wide]
    if kind == "kernels":
        assert takes(x, first, second)
        y = SwiGLUOfTokens.apply(x, first, second, weight, case.plan.ends_e, case.plan.token_n, case.plan.place_tk)
    else:
        library.use("compiled" if kind == "kernels by rows" else "torch", in_bf16=True)
        rows = dispatch.to_experts(x, case.plan)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind != "float64"):
            rows = matmul.swiglu_linear(rows, first, second, row_weight=weight, ends_e=case.plan.ends_e)
        y = dispatch.from_experts(rows, case.plan)
    gradients = torch.autograd.grad(y, leaves, case.grad.to(y.dtype))
    library.use("compiled", in_bf16=True)
    return [y.detach(), *gradients]


SIZES = {  # tokens, experts, a token's, width, an expert's
    "tiny": (256, 16, 4, 256, 96),
    "smallest": (1, 1, 1, 2, 2),
    "no_multiples_of_a_register": (100, 5, 2, 46, 18),
    "empty_experts": (3, 64, 2, 64, 32),
    "more_rows_than_a_block": (700, 2, 2, 64, 80),
}


@pytest.mark.parametrize("favourite", [False, True], ids=["spread", "all_to_the_same"])
@pytest.mark.parametrize("name", SIZES)
def test_experts_are_nearer_to_float64_than_torchs_operations(name: str, favourite: bool) -> None:
    case = layer(*SIZES[name], favourite=favourite)
    exact, torchs, found = (through(case, kind) for kind in ("float64", "torch", "kernels"))
    assert [x.dtype for x in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    for each, other, right in zip(found, torchs, exact, strict=True):
        assert error(each, right) <= allowed(other, right)
    by_rows = through(case, "kernels by rows")
    assert all(torch.equal(one, other) for one, other in zip(by_rows[2:4], found[2:4], strict=True))
    assert torch.equal(by_rows[0], found[0])


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(8, 90), st.integers(1, 9), st.integers(1, 3), st.integers(1, 70), st.integers(1, 40)),
    st.booleans(),
)
def test_experts_of_any_even_size(sizes: tuple[int, ...], favourite: bool) -> None:
    t, experts, k, half_d, half_f = sizes
    case = layer(t, experts, min(k, experts), 2 * half_d, 2 * half_f, favourite)
    for each, right in zip(through(case, "kernels"), through(case, "float64"), strict=True):
        assert error(each, right) < floor(right)


def multiplied(m: int, i: int, o: int, f: int | None, kind: str) -> list[Tensor]:
    """Result and gradients of a linear layer (i to o), or of a SwiGLU of width f (i to i)."""
    shapes = [(o, i)] if f is None else [(2 * f, i), (i, f)]
    weights = [drawn(*shape, seed=seed, scale=shape[1] ** -0.5) for seed, shape in enumerate(shapes)]
    x, grad = drawn(m, i, seed=7).bfloat16(), drawn(m, shapes[-1][0], seed=8).bfloat16()
    wide = [x.double() if kind == "float64" else x for x in (x, *weights)]
    leaves = [x.clone().requires_grad_() for x in wide]
    if kind == "kernels":
        assert linear.takes(*leaves)
    function = matmul.linear if f is None else matmul.swiglu_linear
    library.use("compiled" if kind == "kernels" else "torch", in_bf16=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind != "float64"):
        y = function(*leaves)
    gradients = torch.autograd.grad(y, leaves, grad.to(y.dtype))
    library.use("compiled", in_bf16=True)
    return [y.detach(), *gradients]


LAYERS = {
    "tiny": (300, 256, 1536, None),
    "no_multiples_of_a_register": (65, 46, 18, None),
    "wider_than_a_chunk": (100, 600, 530, None),
    "rows_of_many_chunks": (2400, 50, 130, None),
    "swiglu": (300, 256, 256, 784),
    "swiglu_of_few": (64, 10, 10, 6),
}


@pytest.mark.parametrize("name", LAYERS)
def test_linear_layers_are_as_near_to_float64_as_torchs_operations(name: str) -> None:
    exact, torchs, found = (multiplied(*LAYERS[name], kind) for kind in ("float64", "torch", "kernels"))
    assert not any(torch.equal(one, other) for one, other in zip(found[2:], torchs[2:], strict=True))
    for each, other, right in zip(found, torchs, exact, strict=True):
        assert each.dtype == other.dtype
        assert error(each, right) <= allowed(other, right)


@settings(max_examples=25, deadline=None)
@given(st.integers(64, 300), st.integers(1, 150), st.integers(1, 150), st.one_of(st.none(), st.integers(1, 60)))
def test_linear_layers_of_any_even_size(m: int, half_i: int, half_o: int, half_f: int | None) -> None:
    sizes = m, 2 * half_i, 2 * half_o, None if half_f is None else 2 * half_f
    for each, right in zip(multiplied(*sizes, "kernels"), multiplied(*sizes, "float64"), strict=True):
        assert error(each, right) < floor(right)


def test_few_rows_and_other_formats_are_torchs() -> None:
    weight = torch.ones(4, 6)
    assert linear.takes(torch.ones(64, 6), weight)
    assert not linear.takes(torch.ones(63, 6), weight)
    assert not linear.takes(torch.ones(64, 6), weight.bfloat16())
    assert not linear.takes(torch.ones(64, 5), torch.ones(4, 5))


def test_sizes_that_do_not_go_together_are_refused() -> None:
    """By torch; the kernels would read what is beside a tensor."""
    x = torch.ones(64, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            matmul.linear(x, torch.ones(6, 10))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            matmul.swiglu_linear(x, torch.ones(12, 8), torch.ones(8, 4))
    assert not takes(x, torch.ones(2, 4, 10), torch.ones(2, 10, 2))


def test_experts_that_are_cut_over_processes_are_left_to_the_call_that_gathers_them() -> None:
    case = layer(*SIZES["smallest"])
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        first, second = (distribute_tensor(weight, mesh, [Shard(0)]) for weight in (case.first, case.second))
        assert not takes(case.x, first, second)
    finally:
        torch.distributed.destroy_process_group()


def test_second_derivatives_are_refused() -> None:
    x, weight = (drawn(*shape, seed=0).requires_grad_() for shape in [(64, 8), (6, 8)])
    with torch.autocast("cpu", torch.bfloat16):
        y = matmul.linear(x, weight)
    (gradient,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(gradient.sum(), x)


def test_numbers_at_odd_places_in_memory_are_read_as_they_are() -> None:
    x, weight = drawn(64, 6, seed=0).bfloat16(), drawn(4, 6, seed=1)
    odd_x, odd_weight = (torch.cat((y.flatten()[:1], y.flatten()))[1:].view_as(y) for y in (x, weight))
    assert odd_x.data_ptr() % 4
    assert torch.equal(linear.linear_forward(odd_x, odd_weight), linear.linear_forward(x, weight))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 9), st.integers(0, 2**16), st.booleans())
def test_routing_is_that_of_torch_to_the_bit(t: int, experts: int, k: int, seed: int, equal: bool) -> None:
    k, generator = min(k, experts), torch.Generator().manual_seed(seed)
    scores = torch.randn(t, experts, generator=generator)
    if equal:
        scores = scores.round()  # many are
    scores[torch.rand(t, experts, generator=generator) < 0.05] = -torch.inf
    real = torch.rand(t, generator=generator) < 0.7
    found = routing.top_experts(scores, k)
    assert torch.equal(found, scores.sort(descending=True, stable=True).indices[:, :k])
    plan = dispatch.plan(found, real, experts)
    library.use("torch", in_bf16=True)
    try:
        torchs = dispatch.plan(found, real, experts)
    finally:
        library.use("compiled", in_bf16=True)
    assert all(torch.equal(one, other) for one, other in zip(plan, torchs, strict=True))
    assert [x.dtype for x in plan] == [x.dtype for x in torchs]


def test_scores_that_are_no_numbers_choose_experts_that_there_are() -> None:
    scores = torch.tensor([[torch.nan] * 5, [0.0, torch.nan, torch.inf, 1.0, torch.nan], [-torch.inf] * 5])
    assert routing.top_experts(scores, 4).tolist() == [[0, 1, 2, 3], [1, 2, 4, 3], [0, 1, 2, 3]]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 300), st.integers(1, 70), st.integers(1, 9), st.integers(0, 2**16))
def test_choices_shares_and_their_gradients_are_those_of_float64(
    b: int, length: int, experts: int, k: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    config = dataclasses.replace(MOE, num_experts=experts, top_k=min(k, experts), routed_scaling_factor=2.5)
    logits = torch.randn(b * length, experts, generator=generator)
    real = torch.rand(b, length, generator=generator) < 0.8
    bias = torch.randn(experts, generator=torch.Generator().manual_seed(1)) * 0.1
    scores = (logits.double().sigmoid() + bias).sort(descending=True).values[:, : config.top_k + 1]
    assume(bool((scores.diff() < -1e-6).all()))  # of two that FP32 cannot tell apart either may be chosen
    found = []
    for made in (Router(config, 8), Router(config, 8).double()):
        made.selection_bias.copy_(bias)
        leaf = logits.to(made.weight.dtype).clone().requires_grad_()
        choice = made.choose(leaf, real, shares=True)
        assert choice.share_be is not None
        value = (choice.gate_tk * torch.arange(1, k + 1)[: config.top_k]).sum() + (choice.share_be.square()).sum()
        found.append([choice.expert_tk, choice.gate_tk, choice.share_be, *torch.autograd.grad(value, leaf)])
    (mine, *others), (theirs, *exact) = found
    assert torch.equal(mine, theirs)
    for each, right in zip(others, exact, strict=True):  # gradients are differences of terms of this size
        atol = 1e-6 * (k**2 + length)
        torch.testing.assert_close(each.detach().double(), right.detach(), rtol=1e-5, atol=atol)


def test_choices_are_the_same_on_any_number_of_cores() -> None:
    logits, bias, real = drawn(4 * 300, 64, seed=1), drawn(64, seed=2), drawn(4, 300, seed=3) > -1
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        leaf = logits.clone().requires_grad_()
        expert, score, share = routing.Chosen.apply(leaf, bias, real, 6)
        found.append([expert, score, share, *torch.autograd.grad((score.square().sum(), share.square().sum()), leaf)])
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.integers(64, 400), st.integers(1, 300), st.integers(1, 280))
def test_the_router_is_as_near_to_float64_as_torch(t: int, d: int, experts: int) -> None:
    x, weight, grad = drawn(t, d, seed=1), drawn(experts, d, seed=2), drawn(t, experts, seed=3)
    found = []
    for function in (router.RouterLinear.apply, F.linear):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        logits = function(*leaves)
        found.append([logits.detach(), *torch.autograd.grad(logits, leaves, grad)])
    exact = [x.double() @ weight.double().T, grad.double() @ weight.double(), grad.double().T @ x.double()]
    assert router.takes(x, weight)
    for each, torchs, right in zip(*found, exact, strict=True):
        assert error(each, right) <= 3 * error(torchs, right) + 1e-6  # sums in another order, of up to 400 terms


MUON = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "ns_steps": 5, "weight_decay": 0.1}


def muon_in_float64(parameter: Tensor, gradients: list[Tensor], rows: int) -> list[Tensor]:
    """What the weights become, and the momentum: the algorithm of Muon, matrix by matrix of so many rows."""
    weight = parameter.double().reshape(-1, rows, parameter.shape[-1])
    momentum = torch.zeros_like(weight)
    for gradient in gradients:
        momentum = 0.9 * momentum + 0.1 * gradient.double().reshape(weight.shape)
        x = 0.9 * momentum + 0.1 * gradient.double().reshape(weight.shape)
        x = x / torch.linalg.matrix_norm(x, keepdim=True)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        weight = 0.99 * weight - 0.1 * 0.2 * max(weight.shape[1:]) ** 0.5 * x
    return [weight.view(parameter.shape), momentum.view(parameter.shape)]


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("shape", [(3, 96, 256), (4, 256, 96), (2, 36, 18), (2, 64, 64), (1, 132, 2), (40, 300)])
def test_muon_is_as_near_to_float64_as_torchs_operations(shape: tuple[int, ...], joined: bool) -> None:
    """Two gradients, not more: each step makes differences of rounding larger."""
    parameter, gradients, found = drawn(*shape, seed=0), [drawn(*shape, seed=seed) for seed in (1, 2)], []
    exact = muon_in_float64(parameter, gradients, shape[-2] // (2 if joined else 1))
    for kind in ("compiled", "torch"):
        library.use(kind, in_bf16=True)
        weight = torch.nn.Parameter(parameter.clone())
        optimizer = Muon([weight], **MUON, joined=[weight] if joined else [])
        for weight.grad in gradients:
            optimizer.step()
        found.append([weight.detach(), optimizer.state[weight]["momentum_buffer"]])
    library.use("compiled", in_bf16=True)
    for each, other, right, before in zip(*found, exact, (parameter, 0.0), strict=True):
        count = parameter.shape[:-2].numel() * (2 if joined else 1)  # a matrix goes wrong as a whole
        assert error(each - before, right - before) <= allowed(other - before, right - before, count)
    assert not torch.equal(found[0][0], found[1][0])


def test_muon_gives_the_same_bits_on_any_number_of_cores_also_where_there_are_fewer_matrices() -> None:
    parameter, gradients, found = drawn(1, 64, 36, seed=0), [drawn(1, 64, 36, seed=seed) for seed in (1, 2)], []
    before = torch.get_num_threads()
    try:
        for cores in (1, 2, 3):
            torch.set_num_threads(cores)
            weight = torch.nn.Parameter(parameter.clone())
            optimizer = Muon([weight], **MUON)
            for weight.grad in gradients:
                optimizer.step()
            found.append(weight.detach())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], each) for each in found[1:])


def test_any_number_of_cores_gives_the_same_bits() -> None:
    case, found = layer(*SIZES["tiny"]), []
    before = torch.get_num_threads()
    try:
        for cores in (1, 2, 3):
            torch.set_num_threads(cores)
            layers = [
                each for name in ("swiglu", "rows_of_many_chunks") for each in multiplied(*LAYERS[name], "kernels")
            ]
            found.append([*through(case, "kernels"), *layers])
    finally:
        torch.set_num_threads(before)
    for each in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], each, strict=True))


def test_a_number_that_is_none_is_not_lost_and_stays_with_its_token() -> None:
    case = layer(*SIZES["tiny"])
    case.x[7, 3] = torch.nan
    y = through(case, "kernels")[0]
    assert y[7].isnan().all()
    assert torch.cat((y[:7], y[8:])).isfinite().all()


@pytest.mark.parametrize("kind", ["compiled", "torch"])
def test_the_ways_to_training_are_the_same(kind: str) -> None:
    """Which of them runs is asked of the process, and what they do not do is torch's."""
    library.use("compiled" if kind == "compiled" else "torch", in_bf16=True)
    try:
        case = layer(*SIZES["tiny"])
        assert takes(case.x, case.first, case.second) is (kind == "compiled")
        assert not takes(case.x.float(), case.first, case.second)
        assert not takes(case.x, case.first.bfloat16(), case.second.bfloat16())
        assert not takes(case.x, case.first[:, :, :255], case.second[:, :255])
    finally:
        library.use("compiled", in_bf16=True)
