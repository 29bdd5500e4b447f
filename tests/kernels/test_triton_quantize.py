"""Rounding in Triton bit for bit as precision/quantize.py does it, in both layouts, for ragged groups."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from kernel_checks import held_to_reference, same

from moe_train.config import OperandConfig
from moe_train.kernels import quantize, reference
from moe_train.kernels.capability import card
from moe_train.kernels.device import decode, encode, find_piece, narrow
from moe_train.kernels.layouts import DTYPES

OPERANDS = [
    OperandConfig(format, scale_of, power)  # type: ignore[arg-type]
    for format, power in (("e4m3", False), ("e5m2", True))
    for scale_of in ("tile", "block", "row", "tensor")
]


@triton.jit
def _encode_kernel(x, out, count, E4M3: tl.constexpr, NATIVE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, encode(tl.load(x + at, mask=at < count, other=0.0), E4M3, NATIVE), mask=at < count)


@triton.jit
def _decode_kernel(x, out, E4M3: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(out + at, decode(tl.load(x + at), E4M3))


@triton.jit
def _narrow_kernel(x, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rounded = narrow(tl.load(x + at, mask=at < count, other=0.0), out.dtype.element_ty)
    tl.store(out + at, rounded, mask=at < count)


@triton.jit
def _find_kernel(ends, pieces, out, groups, rows, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    group, start, end, _ = find_piece(ends, tl.load(pieces + tl.program_id(0)), groups, rows, GROUPS, SIZE)
    at = out + tl.program_id(0) * 3
    tl.store(at, group)
    tl.store(at + 1, start)
    tl.store(at + 2, end)


def lanes(device: torch.device) -> int:
    """Numbers a program takes: the interpreter is slow by the program."""
    return 1024 if device.type == "cuda" else 65536


def all_beginnings(device: torch.device) -> Tensor:
    """FP32 numbers: every sign, exponent and 7 bits of mantissa, with what decides ties behind them."""
    high = torch.arange(2**16, dtype=torch.int64)[:, None] << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (high | low).flatten()
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(device, torch.int32).view(torch.float32)


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_fp32_becomes_the_nearest_fp8_number(format: str, device: torch.device) -> None:
    x = all_beginnings(device)
    largest = torch.finfo(DTYPES[format]).max
    x = x[x.isnan() | (x.abs() <= largest)]
    for native in {False, card(device).rounds_fp8}:
        out = torch.empty(len(x), dtype=torch.uint8, device=device)
        block = lanes(device)
        _encode_kernel[(triton.cdiv(len(x), block),)](x, out, len(x), format == "e4m3", native, block)
        assert same(out.view(DTYPES[format]), x.to(DTYPES[format]))


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_a_byte_becomes_its_value(format: str, device: torch.device) -> None:
    byte = torch.arange(256, device=device).to(torch.uint8)
    out = torch.empty(256, dtype=torch.float16, device=device)
    _decode_kernel[(1,)](byte, out, format == "e4m3")
    assert same(out, byte.view(DTYPES[format]).to(torch.float16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results_are_rounded_to_the_nearest_number(dtype: torch.dtype, device: torch.device) -> None:
    x = all_beginnings(device)
    out = torch.empty(len(x), dtype=dtype, device=device)
    _narrow_kernel[(triton.cdiv(len(x), lanes(device)),)](x, out, len(x), lanes(device))
    assert same(out, x.to(dtype))


@pytest.mark.parametrize("size", [64, 128])
def test_a_program_finds_its_group_among_five_hundred(size: int, device: torch.device) -> None:
    sizes = torch.randint(0, 3 * size, (500,)) * (torch.rand(500) < 0.7)
    ends = sizes.cumsum(0).to(device, torch.int32)
    rows = int(ends[-1]) + 100
    expected = [
        (group, start, int(end))
        for group, (length, end) in enumerate(zip([*sizes.tolist(), 100], [*ends.tolist(), rows]))
        for start in range(int(end) - length, int(end), size)
    ]
    expected += [(512, rows, rows)] * 5  # a program too many
    pieces = torch.cat([torch.randperm(len(expected))[:60], torch.tensor([0, len(expected) - 6, len(expected) - 1])])
    found = torch.empty(len(pieces), 3, dtype=torch.int32, device=device)
    _find_kernel[(len(pieces),)](ends, pieces.to(device, torch.int32), found, 500, rows, 512, size)
    for (group, start, end), piece in zip(found.tolist(), pieces.tolist()):
        assert group == expected[piece][0]
        assert group > 500 or (start, end) == expected[piece][1:]


def hard(random: Callable[..., Tensor], n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Numbers of all magnitudes, with what rounding can stumble over."""
    x = random(n, k) * torch.logspace(-40, 20, k, device=random(1).device)
    x[3] = 0
    x[4, :140] = torch.finfo(torch.float32).max
    x[10, 3], x[11, 5], x[12, 129], x[13, 3] = math.inf, -math.inf, math.nan, -0.0
    x[20:30] = random(10, k) * 1e-42  # subnormal in FP32 and BF16
    return x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


@pytest.mark.parametrize(
    ("operand", "dtype"), zip(OPERANDS, itertools.cycle([torch.float32, torch.bfloat16, torch.float32]))
)
def test_both_layouts_are_bit_for_bit_the_reference(
    operand: OperandConfig, dtype: torch.dtype, ragged: tuple[int, Tensor], random: Callable[..., Tensor]
) -> None:
    n, ends_e = ragged
    x = hard(random, n, 133 if n < 1000 else 1500, dtype)
    found = quantize.quantize(x, ends_e, rows=operand, columns=operand)
    expected = reference.quantize(x, ends_e, rows=operand, columns=operand)
    held_to_reference(found, expected, ends_e)


@pytest.mark.parametrize("scale_of", ["tile", "row"])
def test_a_kept_operand_is_rounded_again_as_the_reference_does(
    scale_of: str, ragged: tuple[int, Tensor], random: Callable[..., Tensor]
) -> None:
    n, ends_e = ragged
    kept = OperandConfig("e5m2", "block", False)
    rows, _ = reference.quantize(hard(random, n, 133, torch.float32), ends_e, rows=kept, columns=None)
    assert rows is not None
    for power in (False, True):
        again = OperandConfig("e4m3", scale_of, power)  # type: ignore[arg-type]
        found = quantize.quantize_again(rows, ends_e, again)
        expected = reference.quantize_again(rows, ends_e, again)
        held_to_reference((None, found), (None, expected), ends_e)


@pytest.mark.parametrize("scale_of", ["tile", "block", "row", "tensor"])
def test_weights_are_rounded_for_both_directions_at_once(scale_of: str, random: Callable[..., Tensor]) -> None:
    operand = OperandConfig("e4m3", scale_of, False)  # type: ignore[arg-type]
    w = random(3, 131, 20, dtype=torch.float16).mT  # not contiguous
    for asked in ((operand, operand), (operand, None), (None, operand)):
        for found, expected in zip(quantize.round_weights(w, *asked), reference.round_weights(w, *asked)):
            if expected is None or found is None:
                assert found is expected
                continue
            assert same(found.values.contiguous(), expected.values.contiguous())
            assert same(found.scales.contiguous(), expected.scales.contiguous())
            assert found.shared_rows == expected.shared_rows == (scale_of in ("block", "tensor"))


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 200), min_size=1, max_size=5), st.integers(0, 3), st.integers(1, 140))
def test_any_groups_are_rounded_as_the_reference_does(
    device: torch.device, sizes: list[int], behind: int, k: int
) -> None:
    ends_e = torch.tensor(sizes, device=device).cumsum(0, dtype=torch.int32)
    tile, block = OperandConfig("e4m3", "tile", False), OperandConfig("e4m3", "block", True)
    wide = torch.randn(sum(sizes) + behind, k + 3).to(device)
    x = wide[:, 1 : k + 1]  # rows that do not follow one another
    found = quantize.quantize(x, ends_e, rows=tile, columns=block)
    held_to_reference(found, reference.quantize(x, ends_e, rows=tile, columns=block), ends_e)


def test_what_cannot_be_rounded_is_said(random: Callable[..., Tensor]) -> None:
    operand = OperandConfig("e4m3", "tile", False)
    x = random(4, 8)
    with pytest.raises(ValueError, match="float matrix"):
        quantize.quantize(x.double(), torch.tensor([4], dtype=torch.int32), rows=operand, columns=None)
    with pytest.raises(ValueError, match="ends_e"):
        quantize.quantize(x, torch.tensor([4], device=x.device), rows=operand, columns=None)
