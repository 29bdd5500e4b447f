"""Weights of a small model are rounded together and once a step, and what comes of it is what came before."""

from __future__ import annotations

import pytest
import torch
from small_model import SMALL
from taken_kernels import taken
from torch import Tensor

from moe_train.benchmark.arms import TrainingArm
from moe_train.compose import compose_run
from moe_train.cost.kernels import Kernels
from moe_train.precision import gpu_linear, grouped, narrowed
from moe_train.precision.matmul import linear, linears
from moe_train.precision.narrowed import Narrowed
from moe_train.training.runtime import start_runtime


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights were rounded at a time."""
    found: list[int] = []
    copy = torch._foreach_copy_

    def counted(made: list[Tensor], weights: list[Tensor]) -> None:
        found.append(len(weights))
        copy(made, weights)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    return found


def _takes(x: Tensor, dtype: torch.dtype, *weights: Tensor) -> bool:
    return dtype == torch.bfloat16 and all(weight.dtype == torch.float32 for weight in weights)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU takes the layers that are a GPU's."""
    monkeypatch.setattr(gpu_linear, "takes", _takes)


def gradients(x: Tensor, *weights: Tensor) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        y = x
        for weight in weights:
            y = linear(y, weight)
    leaves = [x, *weights]
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))]


def test_a_layers_results_and_gradients_are_those_of_autocast(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU rounds the gradient of a weight in between, so it is the same to the bit."""
    torch.manual_seed(0)
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((3, 5, 16), (24, 16), (8, 24))]
    ours = gradients(*leaves)
    monkeypatch.setattr(gpu_linear, "takes", lambda *_: False)
    theirs = gradients(*leaves)
    assert [each.dtype for each in ours] == [torch.bfloat16] + [torch.float32] * 3
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_layers_of_one_input_are_those_layers(on_cpu: None, casts: list[int]) -> None:
    torch.manual_seed(0)
    x, *weights = (torch.randn(*shape, requires_grad=True) for shape in ((3, 5, 16), (24, 16), (8, 16), (40, 16)))
    grads = [torch.randn(3, 5, len(weight)).bfloat16() for weight in weights]

    def found(together: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            outs = linears(x, *weights) if together else [linear(x, weight) for weight in weights]
        return [*(out.detach() for out in outs), *torch.autograd.grad(outs, [x, *weights], grads)]

    narrow = Narrowed()
    for _ in range(2):
        with narrow.held():
            joined = found(together=True)
        for one, other in zip(joined, found(together=False), strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert (one - other).norm() <= 2**-7 * other.norm()  # of BF16, which x's gradient is summed in or not
    assert casts == [3]


def test_layers_of_one_input_some_of_which_learn(on_cpu: None) -> None:
    x, *weights = torch.randn(4, 16), torch.randn(8, 16), torch.randn(6, 16)
    weights[1].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outs = linears(x, *weights)
    outs[1].sum().backward()
    assert [leaf.grad is not None for leaf in (x, *weights)] == [False, False, True]
    torch.testing.assert_close(weights[1].grad, x.sum(0).expand(6, 16), rtol=2**-6, atol=2**-5)


def test_what_needs_no_gradient_gets_none(on_cpu: None) -> None:
    for wanted in (0, 1):
        leaves = [torch.randn(4, 16), torch.randn(8, 16)]
        leaves[wanted].requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = linear(*leaves)
        y.sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [wanted == 0, wanted == 1]


def test_weights_are_rounded_together_and_once_a_step(on_cpu: None, casts: list[int]) -> None:
    torch.manual_seed(0)
    x, first, second = (torch.randn(*shape, requires_grad=True) for shape in ((3, 16), (24, 16), (8, 24)))
    narrow = Narrowed()
    for step in range(3):
        with narrow.held():
            found = [gradients(x, first, second) for _ in range(2)]  # micro-batches
        assert casts == [2] * step  # the first one learns of them
        expected = gradients(x, first, second)
        for each in found:
            assert all(torch.equal(*pair) for pair in zip(each, expected, strict=True))
        with torch.no_grad():
            first.mul_(1.5)  # the optimizer


def test_weights_of_a_large_model_are_not_held(on_cpu: None, casts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrowed, "_MOST", 24 * 16)
    x, first, second = (torch.randn(*shape, requires_grad=True) for shape in ((3, 16), (24, 16), (8, 24)))
    narrow = Narrowed()
    for _ in range(2):
        with narrow.held():
            found = gradients(x, first, second)
        assert all(torch.equal(*pair) for pair in zip(found, gradients(x, first, second), strict=True))
    assert casts == [1]


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("attention", ["mla", "gqa_4x32"])
def test_a_model_that_holds_them_has_the_same_gradients(
    attention: str, on_cpu: None, casts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SMALL if attention == "mla" else ["model/attention=gqa_4x32", *(s for s in SMALL if "attention" not in s)]
    settings = [*small, "data.vocab_size=512", "batch_size=2", "micro_batch_size=1", "data.sequence_length=8"]
    settings += ["model.num_hidden_layers=2", "precision=bf16", "cpu_kernels=torch", "model/mtp=depth_1"]
    with taken(Kernels.TRITON, in_bf16=True):
        config = compose_run(settings, "test", None)
        arm = TrainingArm(config, start_runtime(config))
        arm._stepper._narrowed = None
        found = []
        for narrow in (None, Narrowed()):
            for _ in range(2):
                arm._stepper._narrowed = narrow
                arm.model.zero_grad(set_to_none=True)
                arm._stepper.passes(0, *arm.batches[0])
            found.append([p.grad for p in arm.model.parameters() if p.grad is not None])
    experts = sum(p.ndim == 3 for p in arm.model.parameters())
    matrices = sum(p.ndim == 2 for p in arm.model.parameters()) - len(arm.model.routers())
    assert casts == [matrices + experts]  # the embedding is the head's weight too
    assert all(torch.equal(*pair) for pair in zip(found[1], found[0], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_a_weights_gradient_is_not_rounded(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3000, 136, device="cuda"), torch.randn(72, 136, device="cuda")
    grad = torch.randn(3000, 72, device="cuda", dtype=dtype)
    weight.requires_grad_()
    assert gpu_linear.takes(x, dtype, weight)
    with torch.autocast("cuda", dtype):
        y = linear(x, weight)
    (found,) = torch.autograd.grad(y, weight, grad)
    exact = grad.double().mT @ x.to(dtype).double()
    assert found.dtype == torch.float32
    assert (found.double() - exact).norm() <= 1e-5 * exact.norm()  # rounded to BF16 it would be 2e-3
    assert grouped.widens_as_it_multiplies(x.device)
