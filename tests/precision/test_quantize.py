"""Rounding to FP8 bit for bit as a loop over single numbers does it, for every shape of pieces and any number."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_train.config import OperandConfig
from moe_train.precision.quantize import DTYPES, PIECE, SMALLEST_SCALE, Quantized, quantize

LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}


def values_of(format: str) -> list[tuple[float, int]]:
    """(value, bits) of every finite number from 0 up, by the definition of the format."""
    exponent_bits, mantissa_bits, bias = (4, 3, 7) if format == "e4m3" else (5, 2, 15)
    found = []
    for bits in range(128):
        exponent, mantissa = bits >> mantissa_bits, bits & (2**mantissa_bits - 1)
        top = exponent == 2**exponent_bits - 1
        if (format == "e4m3" and bits == 127) or (format == "e5m2" and top):
            continue  # NaN, and infinity in E5M2
        fraction = mantissa / 2**mantissa_bits
        value = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
        found.append((value, bits))
    return found


TABLES = {format: values_of(format) for format in LARGEST}


def nearest(x: float, format: str) -> int:
    """Bits of the nearest value, ties to the even one; NaN as 0x7F."""
    if math.isnan(x):
        return 0x7F
    sign = 0x80 if math.copysign(1.0, x) < 0 else 0
    magnitude = min(abs(x), LARGEST[format])
    _, _, bits = min((abs(value - magnitude), bits & 1, bits) for value, bits in TABLES[format])
    return sign | bits


def by_loop(x: np.ndarray, operand: OperandConfig) -> tuple[np.ndarray, np.ndarray]:
    """Bits (rows, inner) and scales of the pieces, one number at a time in FP32."""
    rows, inner = x.shape
    height, width = {"tile": (1, 128), "block": (128, 128), "row": (1, inner), "tensor": (rows, inner)}[
        operand.scale_of
    ]
    bits = np.zeros(x.shape, np.uint8)
    scales = np.zeros((-(-rows // height), -(-inner // width)), np.float32)
    for i, j in itertools.product(range(scales.shape[0]), range(scales.shape[1])):
        piece = x[i * height : (i + 1) * height, j * width : (j + 1) * width]
        largest = np.float32(max((abs(v) for v in piece.flat if np.isfinite(v)), default=0.0))
        scale = np.float32(largest / np.float32(LARGEST[operand.format]))
        if operand.power_of_two and scale > 0:
            scale = np.float32(2.0 ** math.ceil(math.log2(float(scale))))
        scale = max(scale, np.float32(SMALLEST_SCALE)) if scale > 0 else np.float32(1.0)
        scales[i, j] = scale
        for (r, c), v in np.ndenumerate(piece):
            exact = float(np.float32(v) / scale) if np.isfinite(v) else math.nan
            bits[i * height + r, j * width + c] = nearest(exact, operand.format)
    return bits, scales


def bits_of(quantized: Quantized) -> np.ndarray:
    found = quantized.values.view(torch.uint8).numpy().copy()
    nan = quantized.values.to(torch.float32).isnan().numpy()
    found[nan] = 0x7F  # NaN has several forms
    return found


def check(x: Tensor, operand: OperandConfig) -> None:
    found = quantize(x, operand)
    bits, scales = by_loop(x.float().numpy(), operand)
    np.testing.assert_array_equal(found.scales.numpy(), scales)
    np.testing.assert_array_equal(bits_of(found), bits)


OPERANDS = [
    OperandConfig(format, scale_of, power)
    for format in ("e4m3", "e5m2")
    for scale_of in ("tile", "block", "row", "tensor")
    for power in (False, True)
]


@pytest.mark.parametrize("operand", OPERANDS, ids=lambda o: f"{o.format}-{o.scale_of}-{o.power_of_two}")
def test_every_piece_is_rounded_as_by_hand(operand: OperandConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(130, 150, generator=generator) * torch.logspace(-8, 8, 150)
    x[0] = 0  # a row of zeros
    x[:, 140:] = 0
    check(x, operand)


numbers = st.one_of(
    st.floats(width=32),  # NaN, infinities and denormals among them
    st.sampled_from([0.0, -0.0, 448.0, -448.0, 57344.0, 464.0, 2.0**-9, 2.0**-10, 1e-45, 3.4e38, math.inf, math.nan]),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(numbers, min_size=1, max_size=12), st.sampled_from(OPERANDS))
def test_any_numbers_are_rounded_as_by_hand(row: list[float], operand: OperandConfig) -> None:
    check(torch.tensor([row, row[::-1]]), operand)


def test_ties_go_to_even() -> None:
    # 448 makes the scale 1; between 16 and 18 (E4M3 steps by 2 there) lies 17, and 16 has the even mantissa.
    operand = OperandConfig("e4m3", "row", False)
    found = quantize(torch.tensor([[448.0, 17.0, 19.0, -17.0]]), operand).dequantized()
    assert found.tolist() == [[448.0, 16.0, 20.0, -16.0]]


def test_numbers_that_are_not_finite_do_not_reach_their_neighbours() -> None:
    x = torch.tensor([[1.0, math.inf, -2.0, math.nan]])
    found = quantize(x, OperandConfig("e4m3", "tile", False)).dequantized()
    assert found[0, 1].isnan()
    assert found[0, 3].isnan()
    assert found[0, [0, 2]].tolist() == [1.0, -2.0]


@pytest.mark.parametrize("scale_of", ["tile", "block"])
def test_what_is_no_multiple_of_128_has_smaller_last_pieces(scale_of: str) -> None:
    x = torch.ones(PIECE + 1, PIECE + 2)
    x[:, PIECE:] = 100.0
    found = quantize(x, OperandConfig("e4m3", scale_of, False))  # type: ignore[arg-type]
    assert found.scales.shape == ((PIECE + 1, 2) if scale_of == "tile" else (2, 2))
    assert torch.equal(found.dequantized(), x)


def test_experts_are_each_rounded_for_themselves() -> None:
    x = torch.randn(3, 70, 200) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    for operand in OPERANDS:
        together = quantize(x, operand)
        for expert in range(3):
            alone = quantize(x[expert], operand)
            assert torch.equal(together.values[expert].view(torch.uint8), alone.values.view(torch.uint8))
            assert torch.equal(together.scales[expert], alone.scales)


def test_a_second_rounding_of_power_of_two_scales_changes_nothing() -> None:
    # What DeepSeek-V3 has them for: activations rounded along rows, then along columns (section 3.3.3).
    x = torch.randn(256, 256)
    tile = OperandConfig("e4m3", "tile", True)
    once = quantize(x, tile).dequantized()
    lost = []
    for power in (True, False):
        first = quantize(x, OperandConfig("e4m3", "tile", power)).dequantized()
        again = quantize(first.mT, OperandConfig("e4m3", "tile", power)).dequantized().mT
        lost.append((again - first).abs().sum() / first.abs().sum())
    assert lost[0] < 0.1 * lost[1]
    assert once.dtype == torch.float32


def test_fp8_takes_a_quarter_of_fp32s_bytes_and_a_scale_for_128() -> None:
    x = torch.randn(256, 512)
    assert quantize(x, OperandConfig("e4m3", "tile", False)).nbytes == 256 * 512 + 4 * 256 * 4
    assert set(DTYPES.values()) == {torch.float8_e4m3fn, torch.float8_e5m2}
