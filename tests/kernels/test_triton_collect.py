"""Sums of a token's rows in Triton: FP32 sums rounded once, and the dispatch gives the same with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moe_train.kernels.collect import collect
from moe_train.model import dispatch
from moe_train.precision import support

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def in_order(y_nd: Tensor, place_tk: Tensor, added_td: Tensor | None) -> Tensor:
    """In FP32, one after another."""
    total = torch.zeros(len(place_tk), y_nd.shape[1], device=y_nd.device)
    for place_t in place_tk.unbind(1):
        total += y_nd[place_t].float()
    return (total if added_td is None else total + added_td.float()).to(y_nd.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "k", "d"), [(5, 3, 1030), (70, 2, 48), (9, 6, 7), (40, 1, 1)])
def test_rows_are_summed_in_order_and_rounded_once(
    dtype: torch.dtype, tokens: int, k: int, d: int, random: Callable[..., Tensor]
) -> None:
    if random(1).device.type == "cuda":
        tokens *= 500
    y, added = random(k * tokens + 3, 2 * d, dtype=dtype)[:, ::2], random(d, tokens, dtype=dtype).t()
    place = torch.randint(len(y), (tokens, k), generator=torch.Generator().manual_seed(1)).to(y.device)
    for more in (None, added):
        for places in (place, place.int(), place.t().contiguous().t()):
            assert torch.equal(collect(y, places, more), in_order(y, place, more))


def test_no_tokens_and_no_columns_give_empty_results(random: Callable[..., Tensor]) -> None:
    place = torch.zeros(0, 2, dtype=torch.int64, device=random(1).device)
    assert collect(random(3, 8), place).shape == (0, 8)
    assert collect(random(3, 0), place.new_zeros(4, 2)).shape == (4, 0)


def test_operands_that_do_not_fit_are_said(random: Callable[..., Tensor]) -> None:
    place = torch.zeros(2, 2, dtype=torch.int64, device=random(1).device)
    with pytest.raises(ValueError, match="added: 2 rows of 8"):
        collect(random(3, 8), place, random(3, 8))
    with pytest.raises(ValueError, match="int64 or int32"):
        collect(random(3, 8), place.short())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dispatch_gives_the_same_with_it(
    dtype: torch.dtype, random: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, gate, grad = random(50, 24, dtype=dtype), random(50, 3), random(50, 24, dtype=dtype)
    expert_tk = random(50, 8).topk(3).indices
    plan = dispatch.plan(expert_tk, torch.ones(50, dtype=torch.bool, device=x.device), 8)
    found = []
    for kernel in (False, True):
        monkeypatch.setattr(support, "runs_triton", lambda _, kernel=kernel: kernel)
        leaves = [x.clone().requires_grad_(), gate.clone().requires_grad_()]
        rows, gate_n1 = dispatch.to_experts(leaves[0], plan), dispatch.gates_to_experts(leaves[1], plan)
        y = dispatch.from_experts((rows * gate_n1).to(dtype), plan)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
    eps = torch.finfo(dtype).eps
    for with_kernel, without in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(with_kernel, without, rtol=4 * eps, atol=8 * eps)
