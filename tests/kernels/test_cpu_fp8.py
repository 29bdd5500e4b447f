"""FP8 in C: rounded bit for bit as the reference does, products exact but for their sums, counts the same."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import by_autograd, held_to_reference, same
from torch import Tensor

from moe_train.config import OperandConfig
from moe_train.kernels import reference
from moe_train.kernels.cpu import fp8, library
from moe_train.kernels.layouts import DTYPES, PIECE, Columns, Rows
from moe_train.precision import health

pytestmark = pytest.mark.usefixtures("compiled_for_cpu")


OPERANDS = [
    OperandConfig(format, scale_of, power)  # type: ignore[arg-type]
    for format in ("e4m3", "e5m2")
    for scale_of in ("tile", "block", "row", "tensor")
    for power in (False, True)
]
each_operand = pytest.mark.parametrize("operand", OPERANDS, ids=lambda o: f"{o.format}-{o.scale_of}-{o.power_of_two}")

SIZES = [0, 130, 0, 5, 128, 0]  # of groups: empty ones first, in the middle and last
ENDS = torch.tensor(SIZES).cumsum(0, dtype=torch.int32)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hard(k: int, dtype: torch.dtype) -> Tensor:
    """Numbers of all magnitudes, with what rounding can stumble over, and rows behind the last group."""
    x = drawn(sum(SIZES) + 10, k) * torch.logspace(-40, 20, k)
    x[3] = 0
    x[4, :140] = torch.finfo(torch.float32).max
    x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    x[10, 3], x[11, 5], x[12, 129], x[13, 3] = math.inf, -math.inf, math.nan, -0.0
    x[20:30] = drawn(10, k, seed=1) * 1e-42  # subnormal in FP32 and BF16
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_operand
def test_both_layouts_are_bit_for_bit_the_reference(operand: OperandConfig, dtype: torch.dtype) -> None:
    for k in (133, 300):
        x = hard(k, dtype)
        found = fp8.quantize(x, ENDS, rows=operand, columns=operand)
        held_to_reference(found, reference.quantize(x, ENDS, rows=operand, columns=operand), ENDS)
        assert found[0] is not None
        assert not found[0].values[sum(SIZES) :].view(torch.uint8).any()


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_every_beginning_of_an_fp32_number_becomes_the_nearest_fp8_number(format: str) -> None:
    high = torch.arange(2**16, dtype=torch.int64)[:, None] << 16  # sign, exponent, 7 bits of mantissa
    bits = (high | torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).flatten()
    x = torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32)
    largest = torch.finfo(DTYPES[format]).max
    x = x[x.isnan() | (x.abs() <= largest)].clone()
    x[0] = largest  # which makes the scale 1
    operand = OperandConfig(format, "tensor", False)  # type: ignore[arg-type]
    rows, _ = fp8.quantize(x[None], torch.tensor([1], dtype=torch.int32), rows=operand, columns=None)
    assert rows is not None
    assert same(rows.values[0], x.to(DTYPES[format]))


@each_operand
def test_a_kept_operand_is_rounded_again_as_the_reference_does(operand: OperandConfig) -> None:
    for kept in ("e4m3", "e5m2"):
        rows, _ = reference.quantize(
            hard(133, torch.float32),
            ENDS,
            rows=OperandConfig(kept, "block", False),  # type: ignore[arg-type]
            columns=None,
        )
        assert rows is not None
        found, expected = (each.quantize_again(rows, ENDS, operand) for each in (fp8, reference))
        held_to_reference((None, found), (None, expected), ENDS)


@each_operand
def test_weights_are_rounded_for_both_directions_at_once(operand: OperandConfig) -> None:
    w = drawn(3, 131, 20).mT  # not contiguous
    for asked in ((operand, operand), (operand, None), (None, operand)):
        for found, expected in zip(fp8.round_weights(w, *asked), reference.round_weights(w, *asked)):
            if expected is None or found is None:
                assert found is expected
                continue
            assert same(found.values.contiguous(), expected.values.contiguous())
            assert same(found.scales.contiguous(), expected.scales.contiguous())
            assert found.shared_rows == expected.shared_rows


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=5),
    st.integers(0, 3),
    st.integers(1, 300),
    st.tuples(st.sampled_from(OPERANDS), st.sampled_from(OPERANDS)),
)
def test_any_groups_are_rounded_as_the_reference_does(
    sizes: list[int], behind: int, k: int, operands: tuple[OperandConfig, OperandConfig]
) -> None:
    ends_e, (one, other) = torch.tensor(sizes).cumsum(0, dtype=torch.int32), operands
    x = drawn(sum(sizes) + behind, k + 3)[:, 1 : k + 1]  # rows that do not follow one another
    found = fp8.quantize(x, ends_e, rows=one, columns=other)
    held_to_reference(found, reference.quantize(x, ends_e, rows=one, columns=other), ends_e)


def exact(values: Tensor, scales: Tensor) -> Tensor:
    return values.double() * scales.double().repeat_interleave(PIECE, -1)[..., : values.shape[-1]]


def assert_near(found: Tensor, left: Tensor, right: Tensor) -> None:
    """left (r, k) by right (c, k) in float64, to 2^-20 of what the magnitudes add up to: the error of FP32 sums."""
    bound = left.abs() @ right.abs().mT * 2**-20
    assert bool(((found.double() - left @ right.mT).abs() <= bound).all())


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 150), min_size=1, max_size=4),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.sampled_from(OPERANDS), st.sampled_from(OPERANDS)),
)
def test_products_are_those_of_float64_to_the_error_of_fp32_sums(
    sizes: list[int], shape: tuple[int, int], operands: tuple[OperandConfig, OperandConfig]
) -> None:
    (inputs, outputs), (one, other) = shape, operands
    ends_e, rows = torch.tensor(sizes).cumsum(0, dtype=torch.int32), sum(sizes) + 2
    left, columns = fp8.quantize(drawn(rows, inputs), ends_e, rows=one, columns=one)
    _, others = fp8.quantize(drawn(rows, outputs, seed=1), ends_e, rows=None, columns=other)
    forward, backward = fp8.round_weights(drawn(len(sizes), outputs, inputs, seed=2), other, one)
    grads, _ = fp8.quantize(drawn(rows, outputs, seed=3), ends_e, rows=other, columns=None)
    assert left is not None
    assert columns is not None
    assert others is not None
    assert forward is not None
    assert backward is not None
    assert grads is not None
    weight_gradients = fp8.weight_product(columns, others)
    start = piece = 0
    for group, end in enumerate(ends_e.tolist()):
        for each, weight in ((left, forward), (grads, backward)):
            y = fp8.product(each, weight, ends_e, torch.float32)
            right = exact(weight.values[group], weight.scales[group])
            assert_near(y[start:end], exact(each.values, each.scales)[start:end], right)
            assert not y[sum(sizes) :].any()
        last = int(columns.ends_e[group])
        of_group = [
            exact(x.values[:, piece * PIECE : last * PIECE], x.scales[:, piece:last]) for x in (columns, others)
        ]
        assert_near(weight_gradients[group], *of_group)
        start, piece = end, last


def test_every_pair_of_fp8_numbers_is_multiplied_exactly() -> None:
    """Subnormal ones too, with scales of 1; infinity times zero and NaN are NaN."""
    byte, ends_e = torch.arange(256, dtype=torch.uint8), torch.tensor([256], dtype=torch.int32)
    for one, other in itertools.product(DTYPES.values(), repeat=2):
        left = Rows(byte.view(one)[:, None], torch.ones(256, 1))
        right = reference.Weights(byte.view(other)[None, :, None], torch.ones(1, 256, 1), True)
        expected = byte.view(one).float()[:, None] * byte.view(other).float()[None]
        found = fp8.product(left, right, ends_e, torch.float32)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_result_in_bf16_is_the_fp32_one_rounded() -> None:
    operand = OPERANDS[0]
    rows, _ = fp8.quantize(drawn(sum(SIZES), 140), ENDS, rows=operand, columns=None)
    weight, _ = fp8.round_weights(drawn(len(SIZES), 72, 140), operand, None)
    assert rows is not None
    assert weight is not None
    wide = fp8.product(rows, weight, ENDS, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(fp8.product(rows, weight, ENDS, dtype), wide.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_and_its_gradient_are_those_of_float64(weighted: bool, dtype: torch.dtype) -> None:
    n, f, tile = sum(SIZES), 72, OperandConfig("e4m3", "tile", False)
    gate_up, dh = drawn(n, 2 * f).to(dtype), drawn(n, f, seed=1).to(dtype)
    gate = drawn(n, 1, seed=2).to(dtype) if weighted else None
    h, d_gate_up, d_gate = by_autograd(dh, gate_up, gate)
    rows = fp8.swiglu_quantize(gate_up, gate, ENDS, tile)
    straight, turned, own = fp8.swiglu_backward_quantize(dh, gate_up, gate, ENDS, rows=tile, columns=tile)
    assert straight is not None
    assert turned is not None
    # Half a step of E4M3 of the number itself, of the smallest step of its tile, and one rounding to BF16.
    for found, right in ((rows, h), (straight, d_gate_up)):
        wide = reference.dequantized(*found).double()
        smallest = found.scales.double().repeat_interleave(PIECE, 1)[:, : right.shape[1]] * 2**-10
        assert bool(((wide - right).abs() <= right.abs() * (2**-4 + 2**-8) + smallest).all())
    assert turned.ends_e.tolist() == [0, 2, 2, 3, 4, 4]
    assert (own is None) == (d_gate is None)
    if own is not None and d_gate is not None:
        torch.testing.assert_close(own.double(), d_gate, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_kept_operand_is_read_as_the_reference_reads_it(dtype: torch.dtype) -> None:
    for operand in OPERANDS:
        rows, _ = fp8.quantize(drawn(sum(SIZES) + 2, 300), ENDS, rows=operand, columns=None)
        assert rows is not None
        assert same(fp8.dequantize(rows, dtype), reference.dequantize(rows, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_operand
def test_what_is_lost_is_counted_as_torchs_operations_count_it(operand: OperandConfig, dtype: torch.dtype) -> None:
    x = hard(300, dtype)
    rows, columns = reference.quantize(x, ENDS, rows=operand, columns=operand)
    assert rows is not None
    assert columns is not None

    def counted() -> Tensor:
        into = torch.zeros(4, 5, dtype=torch.float64)
        health.count_rows(into, "input", x, rows, ENDS)
        health.count_columns(into, "gradient", x, columns, ENDS)
        health.count_rows(into, "weight", x, Rows(rows.values, rows.scales * 0.4), ENDS)  # as if numbers were cut off
        health.count_columns(
            into, "swiglu_input", x, Columns(columns.values, columns.scales * 0.4, columns.ends_e), ENDS
        )
        return into

    found = counted()
    library.use("torch", in_bf16=True)
    expected = counted()
    library.use("compiled", in_bf16=True)
    assert torch.equal(found, expected)
    assert found[1, 2] > 0
    assert found[3, 2] > 0


def test_results_are_the_same_on_any_number_of_cores() -> None:
    def made() -> list[Tensor]:
        found: list[Tensor] = []
        for sizes in ([700], SIZES):
            ends_e = torch.tensor(sizes).cumsum(0, dtype=torch.int32)
            for operand in (OPERANDS[0], OperandConfig("e5m2", "tensor", False)):
                rows, columns = fp8.quantize(drawn(sum(sizes), 300), ends_e, rows=operand, columns=operand)
                weights = fp8.round_weights(drawn(len(sizes), 90, 300), operand, None)[0]
                assert rows is not None
                assert columns is not None
                assert weights is not None
                pieces = int(columns.ends_e[-1])
                found += [rows.values, rows.scales, columns.values[:, : pieces * PIECE], columns.scales[:, :pieces]]
                found += [fp8.product(rows, weights, ends_e, torch.float32), fp8.weight_product(columns, columns)]
                found += [torch.tensor(fp8.count(drawn(sum(sizes), 300), rows, ends_e))]
        return found

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = made()
        torch.set_num_threads(2)
        for _ in range(3):
            assert all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in zip(alone, made()))
    finally:
        torch.set_num_threads(before)
