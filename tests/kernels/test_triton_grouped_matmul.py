"""Grouped products in Triton within the error of FP32 sums, for every format, any strides and ragged groups."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernel_checks import count_calls

from moe_train.kernels import grouped_hopper, grouped_matmul
from moe_train.kernels.capability import of_capability
from moe_train.kernels.sums import sum_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def held(found: Tensor, left: Tensor, right: Tensor) -> None:
    """found = left · right within k · 2⁻²⁴ of the sum of magnitudes, summed in any order, and the result's rounding.

    Tensor cores cut off rather than round, and keep a little less: four times as much.
    """
    left, right = left.double(), right.double()
    error = (found.double() - left @ right).abs()
    unit = 2.0**-24 if found.device.type == "cpu" else 2.0**-22
    relative = (left.shape[-1] + 4) * unit + torch.finfo(found.dtype).eps
    assert (error <= left.abs() @ right.abs() * relative + 1e-6 * (found.dtype == torch.float16)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "o"), [(75, 140), (64, 32)])
def test_products_of_ragged_groups(
    dtype: torch.dtype, k: int, o: int, ragged: tuple[int, Tensor], random: Callable[..., Tensor]
) -> None:
    n, ends_e = ragged
    if n > 1000:
        k, o = 8 * k, 8 * o
    x, w, dy = random(n, k, dtype=dtype), random(len(ends_e), o, k, dtype=dtype), random(n, o, dtype=dtype)
    x[int(ends_e[-1]) :] = torch.nan  # rows of no group
    y = grouped_matmul.grouped_product(x, w, ends_e)
    dx = grouped_matmul.grouped_product(dy, w.mT, ends_e)
    dw = grouped_matmul.grouped_weight_product(dy, x, ends_e)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, torch.float32)
    start = 0
    for group, end in enumerate(ends_e.tolist()):
        held(y[start:end], x[start:end], w[group].mT)
        held(dx[start:end], dy[start:end], w[group])
        held(dw[group], dy[start:end].mT, x[start:end])
        start = end
    assert (y[start:] == 0).all()
    assert (dx[start:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_rows_read_where_they_are_give_the_bits_of_copied_ones(
    dtype: torch.dtype, index: torch.dtype, ragged: tuple[int, Tensor], random: Callable[..., Tensor]
) -> None:
    n, ends_e = ragged
    k, o = (75, 140) if n < 1000 else (600, 1120)
    source = torch.randint(n // 3, (2 * n,), generator=torch.Generator().manual_seed(3)).to(ends_e.device, index)[::2]
    x, w = random(k, n // 3, dtype=dtype).t(), random(len(ends_e), o, k, dtype=dtype)
    dy, few = random(n, o, dtype=dtype), random(n // 3, o, dtype=dtype)
    rows = x[source.long()]
    assert torch.equal(
        grouped_matmul.grouped_product(x, w, ends_e, source), grouped_matmul.grouped_product(rows, w, ends_e)
    )
    product = grouped_matmul.grouped_weight_product
    assert torch.equal(product(dy, x, ends_e, right_source_n=source), product(dy, rows, ends_e))
    assert torch.equal(product(x, dy, ends_e, left_source_n=source), product(rows, dy, ends_e))
    both = product(x, few, ends_e, dtype, left_source_n=source, right_source_n=source)
    assert torch.equal(both, product(rows, few[source.long()], ends_e, dtype))


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("indexed", [False, True])
def test_weight_gradients_of_few_programs_are_summed_in_parts(
    out: torch.dtype, indexed: bool, random: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty group, one of fewer rows than there are parts, one that fills none of them and one that does."""
    x, dy = random(2600, 75), random(2600, 40)
    ends_e = torch.tensor([0, 3, 1000, 1000, 2600], dtype=torch.int32, device=x.device)
    source = torch.randperm(2600, generator=torch.Generator().manual_seed(3)).to(x.device) if indexed else None
    counted: list[int] = []
    parts = grouped_matmul._parts
    monkeypatch.setattr(grouped_matmul, "cores", lambda _: 64)
    monkeypatch.setattr(grouped_matmul, "_parts", lambda *given: counted.append(parts(*given)) or counted[-1])
    found = grouped_matmul.grouped_weight_product(dy, x, ends_e, out, right_source_n=source)
    assert counted == [4]
    rows = x if source is None else x[source]
    start = 0
    for group, end in enumerate(ends_e.tolist()):
        expected = (dy[start:end].double().mT @ rows[start:end].double()).to(out)
        torch.testing.assert_close(found[group], expected, rtol=torch.finfo(out).eps, atol=1e-4)
        start = end


@pytest.mark.parametrize("shape", [(1, 5), (3, 2, 700), (1024, 128), (1300, 9), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_summed_exactly_enough(
    shape: tuple[int, ...], dtype: torch.dtype, random: Callable[..., Tensor]
) -> None:
    parts = random(*shape)
    expected = parts.double().sum(0).to(dtype)
    # A column's magnitudes come to about 1,000, of which FP32 has a unit of 6e-5.
    torch.testing.assert_close(sum_of(parts, dtype), expected, rtol=torch.finfo(dtype).eps, atol=6e-5)


def test_operands_that_do_not_fit_are_said(random: Callable[..., Tensor]) -> None:
    x, w = random(4, 8), random(1, 3, 8)
    ends_e = torch.tensor([4], dtype=torch.int32, device=x.device)
    with pytest.raises(ValueError, match="both FP32"):
        grouped_matmul.grouped_product(x, w.half(), ends_e)
    with pytest.raises(ValueError, match="inner dimensions are 7 and 8"):
        grouped_matmul.grouped_product(x[:, 1:], w, ends_e)
    with pytest.raises(ValueError, match="ends_e"):
        grouped_matmul.grouped_weight_product(x, x, ends_e.long())
    with pytest.raises(ValueError, match="source: one int64 or int32"):
        grouped_matmul.grouped_product(x, w, ends_e, ends_e.short())
    with pytest.raises(ValueError, match="4 and 1 rows"):
        grouped_matmul.grouped_weight_product(x, x, ends_e, right_source_n=ends_e - 1)


@pytest.fixture
def hopper(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compute capability 9.0, or as if it were, and blocks enough. Which of grouped_hopper.py's products were made."""
    monkeypatch.setattr(grouped_hopper, "fill", lambda blocks, device: True)
    if device.type == "cpu":
        monkeypatch.setattr(grouped_hopper, "card", lambda _: of_capability((9, 0)))
    elif torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("for compute capability 9.0")
    made: list[str] = []
    count_calls(monkeypatch, grouped_hopper, ("product", "weight_product"), made)
    return made


@pytest.fixture
def enough(device: torch.device) -> tuple[int, Tensor]:
    """As `ragged`, and more than half a block a group."""
    sizes = [0, 130, 0, 5, 257, 0] if device.type == "cpu" else [0, 1300, 0, 5, 128, 4000, 77, 2048, 0]
    return sum(sizes) + 10, torch.tensor(sizes, device=device).cumsum(0, dtype=torch.int32)


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("k", "o"), [(64, 192), (128, 48), (192, 320)])
def test_products_by_descriptors(
    dtype: torch.dtype,
    k: int,
    o: int,
    hopper: list[str],
    enough: tuple[int, Tensor],
    random: Callable[..., Tensor],
) -> None:
    n, ends_e = enough
    wide, stacked = random(n, k + 32, dtype=dtype), random(2 * len(ends_e), o, k, dtype=dtype)
    x, w, across = wide[:, 16:-16], stacked[len(ends_e) :], random(len(ends_e), k, o, dtype=dtype).mT
    x[int(ends_e[-1]) :] = torch.nan  # rows of no group
    stacked[: len(ends_e)] = wide[:, :16] = wide[:, -16:] = torch.nan
    for weights in (w, across):
        y = grouped_matmul.grouped_product(x, weights, ends_e)
        start = 0
        for group, end in enumerate(ends_e.tolist()):
            held(y[start:end], x[start:end], weights[group].mT)
            start = end
        assert (y[start:] == 0).all()
        assert y.dtype == dtype
    assert hopper == ["product"] * 2


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("index", "tokens"), [(torch.int64, 50), (torch.int32, 1000)])
def test_products_by_descriptors_of_rows_read_where_they_are(
    dtype: torch.dtype,
    index: torch.dtype,
    tokens: int,
    hopper: list[str],
    enough: tuple[int, Tensor],
    random: Callable[..., Tensor],
) -> None:
    n, ends_e = enough
    k, o = 128, 272
    source = torch.randint(tokens - 1, (n,), generator=torch.Generator().manual_seed(3)).to(ends_e.device, index)
    source[int(ends_e[-1]) :] = tokens - 1
    x = random(tokens, k, dtype=dtype)
    x[-1] = torch.nan  # of no group
    rows = x[source.long()]
    for weights in (random(len(ends_e), o, k, dtype=dtype), random(len(ends_e), k, o, dtype=dtype).mT):
        y = grouped_matmul.grouped_product(x, weights, ends_e, source)
        start = 0
        for group, end in enumerate(ends_e.tolist()):
            held(y[start:end], rows[start:end], weights[group].mT)
            start = end
        assert (y[start:] == 0).all()
    assert hopper == ["product"] * 2


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("narrow", [48, 144, 512])
def test_weight_gradients_by_descriptors(
    dtype: torch.dtype,
    narrow: int,
    hopper: list[str],
    enough: tuple[int, Tensor],
    random: Callable[..., Tensor],
) -> None:
    n, ends_e = enough
    tokens, hidden, last = 60, 256, int(ends_e[-1])
    source = torch.randint(tokens - 1, (2 * n,), generator=torch.Generator().manual_seed(3)).to(ends_e.device)[::2]
    source[last:] = tokens - 1
    x, dy = random(tokens, hidden, dtype=dtype), random(n, narrow, dtype=dtype)
    x[-1] = dy[last:] = torch.nan  # rows of no group
    rows = x[source]
    right = grouped_matmul.grouped_weight_product(dy, x, ends_e, right_source_n=source)
    left = grouped_matmul.grouped_weight_product(x, dy, ends_e, dtype, left_source_n=source)
    assert hopper == ["weight_product"] * 2
    assert (right.dtype, left.dtype) == (torch.float32, dtype)
    start = 0
    for group, end in enumerate(ends_e.tolist()):
        held(right[group], dy[start:end].mT, rows[start:end])
        held(left[group], rows[start:end].mT, dy[start:end])
        if start == end:
            assert (right[group] == 0).all()
        start = end


def test_what_descriptors_cannot_have_is_made_elsewhere(hopper: list[str], random: Callable[..., Tensor]) -> None:
    x, w = random(200, 128).bfloat16(), random(2, 256, 128).bfloat16()
    ends_e = torch.tensor([90, 200], dtype=torch.int32, device=x.device)
    source = torch.arange(200, device=x.device)
    assert grouped_hopper.takes_product(x, w)
    assert grouped_hopper.takes_product(x, w, source)
    others = [
        (x.float(), w.float()),  # format
        (x[:, :96], w[..., :96].contiguous()),  # inner size
        (x, w[:, :100].contiguous()),  # outputs
        (x, w[:, :128]),  # weights apart
        (x.t().contiguous().t(), w),  # columns
        (random(200, 140).bfloat16()[:, :128], w),  # stride
        (random(200, 144).bfloat16()[:, 4:132], w),  # address
        (x[:1].expand(200, -1), w),
        (x[:1], w),  # few rows
    ]
    for some, weights in others:
        end = ends_e.clamp(max=len(some))
        y = grouped_matmul.grouped_product(some, weights, end)
        held(y[: end[0]], some[: end[0]], weights[0].mT)
        held(y[end[0] :], some[end[0] :], weights[1].mT)
    dy, few = random(200, 48).bfloat16(), random(200, 100).bfloat16()
    assert grouped_hopper.takes_weight_product(x, dy, source, None, 2)
    assert not grouped_hopper.takes_weight_product(dy, x, None, source, 2)  # 128 columns are half a block
    assert not grouped_hopper.takes_weight_product(x, few, source, None, 2)
    assert not grouped_hopper.takes_weight_product(x, x, source, source, 2)
    assert not grouped_hopper.takes_weight_product(x, x, None, None, 2)
    found = grouped_matmul.grouped_weight_product(dy, x, ends_e, right_source_n=source)
    held(found[1], dy[90:].mT, x[90:])
    assert hopper == []


def test_other_compute_capabilities_have_no_such_products(
    monkeypatch: pytest.MonkeyPatch, random: Callable[..., Tensor]
) -> None:
    x, w, source = random(300, 256).bfloat16(), random(2, 256, 256).bfloat16(), torch.arange(300)
    monkeypatch.setattr(grouped_hopper, "fill", lambda blocks, device: True)
    for capability, taken in {(8, 0): False, (8, 9): False, (9, 0): True, (10, 0): False, (12, 0): False}.items():
        monkeypatch.setattr(grouped_hopper, "card", lambda _, c=capability: of_capability(c))
        assert grouped_hopper.takes_product(x, w) == taken
        assert grouped_hopper.takes_weight_product(x, x, source, None, 2) == taken


@pytest.mark.gpu
def test_a_graph_makes_the_same_products_again(hopper: list[str], random: Callable[..., Tensor]) -> None:
    if not random(1).is_cuda:
        pytest.skip("graphs are CUDA's")
    x, w, h = random(700, 512).bfloat16(), random(6, 256, 512).bfloat16(), random(4000, 256).bfloat16()
    source = torch.randint(700, (4000,), generator=torch.Generator().manual_seed(3)).to(x.device)
    ends_e = torch.tensor([0, 900, 901, 901, 3000, 3990], dtype=torch.int32, device=x.device)

    def products() -> list[Tensor]:
        y = grouped_matmul.grouped_product(x, w, ends_e, source)
        dx = grouped_matmul.grouped_product(y, w.mT, ends_e)
        product = grouped_matmul.grouped_weight_product
        return [y, dx, product(h, x, ends_e, right_source_n=source), product(x, h, ends_e, left_source_n=source)]

    first = products()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = products()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(first, captured, strict=True))
    ends_e.copy_(torch.tensor([10, 10, 2000, 2500, 2501, 4000]))
    x.mul_(-0.5)
    changed = products()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(changed, captured, strict=True))
    assert hopper == ["product", "product", "weight_product", "weight_product"] * 3
