"""The head's loss and gradient in Triton against cross-entropy in FP64, and the model's loss with it and without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from kernel_checks import allowed, error

from moe_train.kernels import head
from moe_train.model import loss
from moe_train.model.loss import IGNORE, head_loss


def exact(logits: Tensor, target: Tensor, z: float) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's loss and squared log-sum-exp, and the gradient, in FP64."""
    leaf = logits.double().requires_grad_()
    nll = F.cross_entropy(leaf, target, ignore_index=IGNORE, reduction="none")
    square = leaf.logsumexp(-1).square() * (target != IGNORE)
    (grad,) = torch.autograd.grad((nll + z * square).sum(), leaf)
    return nll.detach(), square.detach(), grad


def targets(t: int, v: int, device: torch.device) -> Tensor:
    target = torch.randint(0, v, (t,), generator=torch.Generator().manual_seed(1))
    target[::7] = IGNORE
    return target.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("t", "v", "z"), [(30, 257, 0.0), (5, 9000, 1e-2), (4, 4096, 1e-3), (3, 1, 0.1), (9, 2, 0.1)])
def test_losses_and_gradients_are_those_of_fp64_rounded(
    dtype: torch.dtype, t: int, v: int, z: float, random: Callable[..., Tensor]
) -> None:
    logits = 4 * random(t, v, dtype=dtype)
    target = targets(t, v, logits.device)
    nll, square, grad = exact(logits, target, z)
    for gradient in (False, True):
        found = logits.clone()
        found_nll, found_square = head.cross_entropy_(found, target, z, IGNORE, gradient=gradient)
        assert found_nll.dtype == found_square.dtype == torch.float32
        torch.testing.assert_close(found_nll.double(), nll, rtol=3e-6, atol=1e-5)
        torch.testing.assert_close(found_square.double(), square, rtol=1e-5, atol=1e-5)
        if gradient:
            # Half a unit of the format, and FP32's error of an exponential; FP16's smallest step is 6e-8.
            relative = torch.finfo(dtype).eps / 2 + 1e-5
            torch.testing.assert_close(found.double(), grad, rtol=relative, atol=1e-6)
            assert not found[target == IGNORE].any()
        else:
            assert torch.equal(found, logits)


@pytest.mark.gpu
def test_more_logits_than_32_bits_count(random: Callable[..., Tensor]) -> None:
    if random(1).device.type != "cuda":
        pytest.skip("4 GB are for a GPU")
    t, v = 2**14 + 40, 2**17 + 3
    logits = torch.zeros(t, v, dtype=torch.bfloat16, device="cuda")
    logits[-1] = random(v, dtype=torch.bfloat16)
    target = targets(t, v, logits.device)
    target[-1] = v - 1
    nll, square, grad = exact(logits[-1:], target[-1:], 0.0)
    found_nll, found_square = head.cross_entropy_(logits, target, 0.0, IGNORE, gradient=True)
    torch.testing.assert_close(found_nll[-1:].double(), nll, rtol=3e-6, atol=1e-5)
    torch.testing.assert_close(found_square[-1:].double(), square, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[-1:].double(), grad, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_is_none_is_not_lost(value: float, random: Callable[..., Tensor]) -> None:
    logits = random(6, 300)
    logits[2, 299] = value
    target = torch.full((6,), 5, device=logits.device)
    nll, square = head.cross_entropy_(logits, target, 0.0, IGNORE, gradient=True)
    assert nll.isfinite().tolist() == square.isfinite().tolist() == [True, True, False, True, True, True]
    assert logits[2].isnan().all()
    assert logits[3:].isfinite().all()


def test_a_target_that_is_no_entry_and_operands_that_do_not_fit_are_said(random: Callable[..., Tensor]) -> None:
    logits = random(4, 10)
    target = torch.tensor([3, 10, IGNORE, -1], device=logits.device)
    nll, _ = head.cross_entropy_(logits, target, 0.0, IGNORE, gradient=False)
    assert nll.isnan().tolist() == [False, True, False, True]
    with pytest.raises(ValueError, match="one for each of 4 rows"):
        head.cross_entropy_(logits, target[:3], 0.0, IGNORE, gradient=False)
    with pytest.raises(ValueError, match="contiguous"):
        head.cross_entropy_(logits.t(), target, 0.0, IGNORE, gradient=False)
    nll, square = head.cross_entropy_(logits[:0], target[:0], 0.0, IGNORE, gradient=True)
    assert nll.shape == square.shape == (0,)


@pytest.mark.parametrize("z", [0.0, 1e-2])
@pytest.mark.parametrize("in_bf16", [True, False])
def test_the_models_loss_is_as_near_to_fp64_as_without_it(
    z: float, in_bf16: bool, random: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    t, d, v = 45, 16, 300
    hidden, weight = random(t, d), random(v, d) * d**-0.5
    device = hidden.device
    target = targets(t, v, device)
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, device.type, 20 * v)

    def through(by_kernel: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        monkeypatch.setattr(loss, "runs_triton", lambda _: by_kernel)
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16 and dtype == torch.float32):
            objective, nll = head_loss(leaves[0], leaves[1], target, z)
            with torch.no_grad():
                alone = head_loss(leaves[0], leaves[1], target, z)
        torch.testing.assert_close(alone, (objective, nll), rtol=1e-6, atol=1e-5)
        return [objective.detach(), nll, *torch.autograd.grad(objective, leaves)]

    found, without, right = through(True), through(False), through(True, torch.float64)
    for each, other, value in zip(found, without, right, strict=True):
        assert each.dtype == other.dtype
        assert error(each, value) <= allowed(other, value) if in_bf16 else error(each, value) < 1e-5
