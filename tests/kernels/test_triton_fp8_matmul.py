"""FP8 products in Triton within the error of FP32 sums, for ragged groups and sizes that fill no block."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moe_train.config import OperandConfig
from moe_train.kernels import fp8_matmul, reference
from moe_train.kernels.capability import card
from moe_train.kernels.layouts import PIECE, Columns, Rows, Weights


def exact(values: Tensor, scales: Tensor) -> Tensor:
    """FP64 (…, rows, inner)."""
    return values.double() * scales.double().repeat_interleave(PIECE, -1)[..., : values.shape[-1]]


def near(found: Tensor, left: Tensor, right: Tensor) -> bool:
    """Whether `found` is left · rightᵀ in every number, by the error of sums of its k terms in any order.

    In FP32 that is k · 2⁻²⁴ of the sum of magnitudes, four times as much where tensor cores cut off rather than round,
    and the result's own rounding. Those that multiply FP8 add 32 products at a time, whose bits behind the 13th of the
    largest they drop (arXiv 2412.19437, section 3.3.2; measured on an H200: more than 2⁻¹² of the sum of magnitudes
    where 5 terms of 128 are not zero, since each can lose 2⁻¹³ of it): 2⁻⁹ for each number, and 2⁻¹³ for all of them
    together, of which chance leaves far less.
    """
    error = (found.double() - left @ right.mT).abs()
    magnitude = left.abs() @ right.abs().mT
    rounding = torch.finfo(found.dtype).eps
    if card(found.device).multiplies_fp8:
        together = error.norm() <= magnitude.norm() * (2.0**-13 + rounding)
        return bool((error <= magnitude * (2.0**-9 + rounding) + 1e-30).all() and together)
    unit = 2.0**-24 if found.device.type == "cpu" else 2.0**-22
    return bool((error <= magnitude * ((left.shape[-1] + 4) * unit + rounding) + 1e-30).all())


CASES = [
    # left, right, what shares their scales, k, o
    ("e4m3", "e4m3", ("tile", "block"), 200, 150),
    ("e4m3", "e4m3", ("tile", "block"), 256, 140),
    ("e5m2", "e4m3", ("row", "row"), 130, 20),
    ("e5m2", "e5m2", ("tensor", "tensor"), 128, 64),
]


@pytest.mark.parametrize(("left", "right", "scale_of", "k", "o"), CASES)
def test_rows_times_weights(
    left: str,
    right: str,
    scale_of: tuple[str, str],
    k: int,
    o: int,
    ragged: tuple[int, Tensor],
    random: Callable[..., Tensor],
) -> None:
    n, ends_e = ragged
    if n > 1000:
        k, o = 8 * k, 8 * o
    activation = OperandConfig(left, scale_of[0], False)  # type: ignore[arg-type]
    weight = OperandConfig(right, scale_of[1], False)  # type: ignore[arg-type]
    rows, _ = reference.quantize(random(n, k), ends_e, rows=activation, columns=None)
    forward, backward = reference.round_weights(random(len(ends_e), o, k), weight, weight)
    gradients, _ = reference.quantize(random(n, o), ends_e, rows=activation, columns=None)
    assert rows is not None
    assert gradients is not None
    for operand, weights, dtype in ((rows, forward, torch.float32), (gradients, backward, torch.bfloat16)):
        assert weights is not None
        found = fp8_matmul.grouped_product(operand, weights, ends_e, dtype)
        assert found.dtype == dtype
        start = 0
        for group, end in enumerate(ends_e.tolist()):
            x, w = exact(*(t[start:end] for t in operand)), exact(weights.values[group], weights.scales[group])
            assert near(found[start:end], x, w)
            start = end
        assert (found[start:] == 0).all()  # rows of no group


@pytest.mark.parametrize(("left", "right", "scale_of", "o", "i"), CASES)
def test_the_gradient_of_weights_is_summed_over_the_tokens_of_a_group(
    left: str,
    right: str,
    scale_of: tuple[str, str],
    o: int,
    i: int,
    ragged: tuple[int, Tensor],
    random: Callable[..., Tensor],
) -> None:
    n, ends_e = ragged
    if n > 1000:
        o, i = 8 * o, 8 * i
    one = OperandConfig(left, scale_of[0], False)  # type: ignore[arg-type]
    other = OperandConfig(right, scale_of[1], False)  # type: ignore[arg-type]
    _, gradients = reference.quantize(random(n, o), ends_e, rows=None, columns=one)
    _, inputs = reference.quantize(random(n, i), ends_e, rows=None, columns=other)
    assert gradients is not None
    assert inputs is not None
    found = fp8_matmul.grouped_weight_product(unread_spoilt(gradients), unread_spoilt(inputs))
    start = 0
    for group, end in enumerate(gradients.ends_e.tolist()):
        tokens = slice(start * PIECE, end * PIECE)
        dy, x = (exact(c.values[:, tokens], c.scales[:, start:end]) for c in (gradients, inputs))
        assert near(found[group], dy, x)
        start = end


def test_scales_read_ahead_change_no_bit(
    ragged: tuple[int, Tensor], random: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    n, ends_e = ragged
    tile = OperandConfig("e4m3", "tile", False)
    _, columns = reference.quantize(random(n, 70), ends_e, rows=None, columns=tile)
    assert columns is not None
    found = []
    for ahead in (False, True):
        monkeypatch.setattr(fp8_matmul, "_tile", lambda *_, ahead=ahead, **__: fp8_matmul._Tile(64, 64, 4, 3, ahead))
        found.append(fp8_matmul.grouped_weight_product(unread_spoilt(columns), unread_spoilt(columns)))
    assert torch.equal(*found)


def unread_spoilt(columns: Columns) -> Columns:
    """NaN where no product may look: behind the last piece."""
    values, scales = columns.values.clone(), columns.scales.clone()
    values.view(torch.uint8)[:, int(columns.ends_e[-1]) * PIECE :] = 0x7F
    scales[:, int(columns.ends_e[-1]) :] = torch.nan
    return columns._replace(values=values, scales=scales)


@pytest.mark.parametrize("native", [False, True])
def test_every_pair_of_bytes_is_multiplied_exactly(
    native: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FP16, and as FP8 where there is hardware. The interpreter does that right but for E4M3's NaN (0x7F), which it
    takes for 480, and E5M2's subnormals (1 to 3), which it halves."""
    here = card(device)
    if native and device.type == "cuda" and not here.multiplies_fp8:
        pytest.skip("no FP8 hardware")
    monkeypatch.setattr(fp8_matmul, "card", lambda _: here._replace(multiplies_fp8=native))
    ends_e = torch.tensor([256], dtype=torch.int32, device=device)
    ones = torch.ones(256, 1, device=device)
    byte = torch.arange(256, device=device).to(torch.uint8)
    if native and device.type == "cpu":
        byte[[0x7F, 0xFF, 1, 2, 3, 0x81, 0x82, 0x83]] = 0
    for left, right in itertools.product((torch.float8_e4m3fn, torch.float8_e5m2), repeat=2):
        x, w = torch.zeros(2, 256, 16, dtype=torch.uint8, device=device)
        x[:, 0] = w[:, 0] = byte
        weights = Weights(w.view(right)[None], ones[None], False)
        found = fp8_matmul.grouped_product(Rows(x.view(left), ones), weights, ends_e, torch.float32)
        expected = byte.view(left).float()[:, None] * byte.view(right).float()[None, :]
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_operands_that_do_not_fit_are_said(random: Callable[..., Tensor]) -> None:
    tile = OperandConfig("e4m3", "tile", False)
    ends_e = torch.tensor([4], dtype=torch.int32, device=random(1).device)
    rows, _ = reference.quantize(random(4, 32), ends_e, rows=tile, columns=None)
    weights, _ = reference.round_weights(random(1, 8, 16), tile, None)
    assert rows is not None
    assert weights is not None
    with pytest.raises(ValueError, match="inner dimensions are 32 and 16"):
        fp8_matmul.grouped_product(rows, weights, ends_e, torch.float32)
