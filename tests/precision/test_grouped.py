"""The grouped matmul seam against one product a group, in every format and over ragged groups."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_train.precision import cpu_grouped
from moe_train.precision.cpu_threads import on_cores
from moe_train.precision.matmul import grouped_linear


def reference(x: torch.Tensor, weight: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    groups = x.split(sizes)
    return torch.cat([g @ w.t() for g, w in zip(groups, weight, strict=True)])


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 7, 31, 32, 33, 101, 600]), min_size=1, max_size=5),
    bf16=st.booleans(),
)
def test_each_group_is_multiplied_by_its_own_weight_in_both_passes(sizes: list[int], bf16: bool) -> None:
    if sum(sizes) == 0:
        sizes = [*sizes[:-1], 3]
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), 16)
    weight = torch.randn(len(sizes), 24, 16)
    grad = torch.randn(sum(sizes), 24)
    if bf16:  # exact operands, so that only the accumulation and the result are rounded
        x, weight, grad = (t.bfloat16().float() for t in (x, weight, grad))
    ends = torch.tensor(sizes).cumsum(0).int()
    expected_in = [t.double().requires_grad_() for t in (x, weight)]
    expected = reference(*expected_in, sizes)
    expected_grads = torch.autograd.grad(expected, expected_in, grad.double())

    ours_in = [t.clone().requires_grad_() for t in (x, weight)]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        ours = grouped_linear(*ours_in, ends)
    ours_grads = torch.autograd.grad(ours, ours_in, grad.to(ours.dtype))

    assert ours.dtype is (torch.bfloat16 if bf16 else torch.float32)
    floor_db = 45 if bf16 else 110
    for a, b in zip((ours, *ours_grads), (expected, *expected_grads), strict=True):
        error = (a.double() - b).norm()
        assert error == 0 or 20 * torch.log10(b.norm() / error) > floor_db


def test_a_group_without_rows_gets_a_gradient_of_exact_zeros() -> None:
    x = torch.randn(10, 8)
    weight = torch.randn(3, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped_linear(x, weight, torch.tensor([4, 4, 10], dtype=torch.int32))
    out.float().pow(2).sum().backward()
    assert weight.grad is not None
    assert weight.grad[1].abs().max() == 0
    assert weight.grad[[0, 2]].abs().amax((1, 2)).min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_there_is_no_graph_break_and_the_same_result(dtype: torch.dtype) -> None:
    x, weight = torch.randn(70, 16), torch.randn(3, 24, 16)
    ends = torch.tensor([5, 5, 70], dtype=torch.int32)
    found = []
    for function in (grouped_linear, torch.compile(grouped_linear, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            y = function(*leaves, ends)
        y.float().square().sum().backward()
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*found, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_no_host_synchronisation_is_needed() -> None:
    x = torch.randn(256, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(4, 64, 64, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor([64, 64, 128, 256], device="cuda", dtype=torch.int32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = grouped_linear(x, weight, ends)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.float(), reference(x, weight, [64, 0, 64, 128]).float(), rtol=2e-2, atol=2e-1)


def test_products_in_bf16_have_few_shapes_and_next_to_no_rows_for_nothing() -> None:
    narrow = torch.empty(10_000, 0, dtype=torch.bfloat16)
    rounded = {rows: rows + cpu_grouped._missing(narrow[:rows]) for rows in range(1, 10_000)}
    assert len(set(rounded.values())) < 150
    assert all(up < rows + 32 or up <= rows * 1.07 for rows, up in rounded.items())
    assert cpu_grouped._missing(torch.empty(33, 0)) == 0


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where the smallest product is enough for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(cpu_grouped, "_ENOUGH", 0)
    yield
    torch.set_num_threads(before)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.sampled_from([0, 1, 7, 31, 32, 33, 101, 600]), min_size=1, max_size=7).filter(sum))
def test_cores_that_share_the_groups_give_the_bits_of_one(two_threads: None, sizes: list[int]) -> None:
    torch.manual_seed(0)
    x, grad = (torch.randn(sum(sizes), width).bfloat16() for width in (16, 24))
    weight = torch.randn(len(sizes), 24, 16).bfloat16()
    ends = torch.tensor(sizes).cumsum(0).int()

    def products() -> tuple[torch.Tensor, torch.Tensor]:
        return cpu_grouped.grouped_product(x, weight, ends), cpu_grouped.grouped_weight_product(grad, x, ends)

    torch.set_num_threads(2)
    shared = products()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert all(torch.equal(*pair) for pair in zip(shared, products()))


def test_each_thread_of_products_uses_one_core_and_the_others_all_of_them(two_threads: None) -> None:
    numbers: list[int] = []
    for _ in range(2):
        on_cores(lambda _: numbers.append(torch.get_num_threads()), range(2))
    assert numbers == [1, 1, 1, 1]
    assert torch.get_num_threads() == 2


def test_a_forked_process_has_threads_of_its_own(two_threads: None) -> None:
    x, weight, ends = torch.ones(64, 16).bfloat16(), torch.ones(2, 8, 16).bfloat16(), torch.tensor([32, 64]).int()
    expected = cpu_grouped.grouped_product(x, weight, ends)
    child = os.fork()
    if not child:  # where OpenMP's own threads are missing: nothing else may use several
        os._exit(0 if torch.equal(cpu_grouped.grouped_product(x, weight, ends), expected) else 1)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
    assert ended == (child, 0)


def test_what_goes_wrong_on_a_core_is_raised(two_threads: None) -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        cpu_grouped.grouped_product(torch.ones(4, 3).bfloat16(), torch.ones(1, 2, 5).bfloat16(), torch.tensor([4]))
