"""RMSNorm of a sum in C: against float64 and torch, the same on any number of cores; made again backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_train.kernels.cpu import library
from moe_train.kernels.cpu import norm as kernel
from moe_train.model.norm import RMSNorm, normed
from moe_train.precision.remade import remaking

EPS = 1e-6


pytestmark = pytest.mark.usefixtures("compiled_for_cpu")


def inputs(rows: int, features: int, seed: int = 0, magnitude: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The stream, what is added to it, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    x, added = (torch.randn(rows, features, generator=generator) * magnitude for _ in range(2))
    return x, added.bfloat16(), torch.rand(features, generator=generator) + 0.5


def results(kind: str, x: Tensor, added: Tensor | None, weight: Tensor, exact: bool) -> list[Tensor]:
    """Sum, norms, and the gradients of everything that went in, all in float64."""
    library.use("compiled" if kind == "kernel" else "torch", in_bf16=True)
    wide = torch.float64 if kind == "float64" else None
    leaves = [each if each is None else each.to(wide or each.dtype).requires_grad_() for each in (x, added, weight)]
    norm = RMSNorm(len(weight), EPS)
    norm.weight = torch.nn.Parameter(leaves[2])  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16, enabled=kind != "float64"):
        assert kernel.takes(leaves[0], norm.weight, leaves[1]) == (kind == "kernel")
        made = normed(norm, leaves[0], leaves[1], exact=exact)
        total, narrow, wide_norm = made.total, made.narrow, made.exact
    out = [total, narrow, *([wide_norm] if exact else [])]
    ramps = [torch.linspace(-1, 2, each.numel(), dtype=torch.float64).view_as(each).to(each.dtype) for each in out]
    asked = [each for each in (leaves[0], leaves[1], norm.weight) if each is not None]
    gradients = torch.autograd.grad(out, asked, ramps)
    library.use("compiled", in_bf16=True)
    return [each.detach().double() for each in (*out, *gradients)]


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(64, 200),
    features=st.integers(1, 100),
    adds=st.booleans(),
    exact=st.booleans(),
    narrow=st.booleans(),
    magnitude=st.sampled_from([1e-12, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_sum_norms_and_gradients_are_those_of_float64_as_nearly_as_torchs(
    rows: int, features: int, adds: bool, exact: bool, narrow: bool, magnitude: float, seed: int
) -> None:
    """The gradient of x is the difference of two terms that may nearly cancel, so torch's own error is the measure."""
    x, added, weight = inputs(rows, features, seed, magnitude)
    given_x = x.bfloat16() if narrow and not adds else x
    arguments = (given_x, added if adds else None, weight, exact)
    expected, torchs, found = (results(kind, *arguments) for kind in ("float64", "torch", "kernel"))
    for mine, theirs, true in zip(found, torchs, expected, strict=True):
        assert error(mine, true) <= 1.05 * error(theirs, true) + 1e-3 * true.numel() ** -0.5 + 1e-6


def test_bits_do_not_depend_on_the_number_of_cores() -> None:
    x, added, weight = inputs(1000, 96)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(results("kernel", x, added, weight, True))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


def test_rows_that_are_a_part_of_longer_ones_are_read_where_they_lie() -> None:
    x, _, weight = inputs(100, 64)
    longer = torch.randn(100, 80).bfloat16()
    longer[:, :64] = x
    part, alone = longer[:, :64], longer[:, :64].contiguous()
    for mine, other in zip(results("kernel", part, None, weight, False), results("kernel", alone, None, weight, False)):
        assert torch.equal(mine, other)


def test_only_the_sum_is_kept_and_both_norms_are_made_again_with_the_same_bits() -> None:
    x, added, weight = inputs(100, 64)
    norm = RMSNorm(64, EPS)
    norm.weight = torch.nn.Parameter(weight)
    x.requires_grad_()
    read: list[Tensor] = []

    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(*tensors)
            return sum(each.float().sum() for each in tensors)

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            read.extend(ctx.saved_tensors)
            return tuple(torch.ones_like(each) for each in ctx.saved_tensors)

    with torch.autocast("cpu", torch.bfloat16), remaking(True):
        made = normed(norm, x, added, exact=True)
        total, narrow, exact = made.total, made.narrow, made.exact
        del made
        before = [narrow.clone(), exact.clone()]
        where = [torch.multiprocessing.reductions.StorageWeakRef(each.untyped_storage()) for each in (narrow, exact)]
        out = Reads.apply(narrow, exact) + total.sum()
    del narrow, exact
    assert all(each.expired() for each in where)
    out.backward()
    assert all(torch.equal(*pair) for pair in zip(before, read, strict=True))
    assert x.grad is not None


def test_gradients_of_the_stream_alone_go_past_the_norm() -> None:
    x, added, _ = inputs(100, 64)
    norm = RMSNorm(64, EPS)
    leaves = [x.requires_grad_(), added.requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        total = normed(norm, *leaves).total
    grad_x, grad_added = torch.autograd.grad(total, leaves, torch.full_like(total, 0.3))
    assert torch.equal(grad_x, torch.full_like(x, 0.3))
    assert torch.equal(grad_added, torch.full_like(added, 0.3))


def test_nan_stays_in_its_row() -> None:
    x, added, weight = inputs(100, 64)
    x[7, 3] = torch.nan
    total, narrow, exact = results("kernel", x, added, weight, True)[:3]
    for each in (narrow, exact):
        assert each[7].isnan().all()
        assert each.isnan().sum() == 64
    assert total.isnan().sum() == 1


def test_what_it_does_not_take_is_left_to_torch() -> None:
    x, added, weight = inputs(100, 64)
    assert kernel.takes(x, weight, added)
    assert not kernel.takes(x.double(), weight, added)
    assert not kernel.takes(x, weight, added.float())
    assert not kernel.takes(x, weight.bfloat16(), added)
    assert not kernel.takes(x[:10], weight, added[:10])
