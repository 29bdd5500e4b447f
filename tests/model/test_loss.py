"""The fused head and loss against torch's own cross-entropy over whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moe_train.model import loss
from moe_train.model.loss import IGNORE, head_loss


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, z: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = hidden @ weight.t()
    nll = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    lse = torch.logsumexp(logits, -1)[target != IGNORE]
    return nll + z * (lse**2).sum(), nll


@pytest.mark.parametrize("z", [0.0, 1e-2])
@pytest.mark.parametrize("chunk_elements", [1, 64 * 3, 2**21])
def test_loss_and_gradients_equal_the_plain_form_however_it_is_chunked(
    z: float, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", chunk_elements)
    torch.manual_seed(0)
    hidden = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(64, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 64, (10,))
    target[[2, 9]] = IGNORE

    ours, ours_nll = head_loss(hidden, weight, target, z)
    theirs, theirs_nll = plain(hidden, weight, target, z)
    torch.testing.assert_close((ours, ours_nll), (theirs, theirs_nll), rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours / 7, (hidden, weight)), torch.autograd.grad(theirs / 7, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_in_bf16_the_loss_stays_within_a_thousandth_and_gradients_above_30_db() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 64, requires_grad=True)
    weight = (torch.randn(256, 64) * 0.2).requires_grad_()
    target = torch.randint(0, 256, (300,))
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = head_loss(hidden, weight, target)
    theirs, _ = plain(hidden, weight, target, 0.0)
    assert abs(ours.item() / theirs.item() - 1) < 1e-3
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(theirs, (hidden, weight)), strict=True
    ):
        assert 20 * torch.log10(b.norm() / (a - b).norm()) > 30


def test_without_gradients_none_are_computed() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(16, 8)
    objective, nll = head_loss(hidden, weight, torch.arange(4))
    assert not objective.requires_grad
    assert not nll.requires_grad
