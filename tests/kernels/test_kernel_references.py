"""The plain PyTorch forms: what every row and piece is rounded to, where it lies, and what products make of it."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import by_autograd
from torch import Tensor

from moe_train.config import OperandConfig
from moe_train.kernels import reference
from moe_train.kernels.layouts import PIECE, piece_ends, pieces_at_most
from moe_train.precision.quantize import quantize

SIZES = [0, 130, 0, 5, 128, 0]
ENDS = torch.tensor(SIZES).cumsum(0, dtype=torch.int32)
N = sum(SIZES) + 7  # seven rows belong to no group
SCALES_OF = ("tile", "block", "row", "tensor")


def groups() -> list[tuple[int, int]]:
    return [(end - size, end) for size, end in zip(SIZES, ENDS.tolist())]


def dequantized(values: Tensor, scales: Tensor) -> Tensor:
    return values.float() * scales.repeat_interleave(PIECE, -1)[..., : values.shape[-1]]


@pytest.mark.parametrize("scale_of", SCALES_OF)
def test_every_group_is_rounded_by_itself_along_its_rows_and_its_columns(scale_of: str) -> None:
    operand = OperandConfig("e4m3", scale_of, False)  # type: ignore[arg-type]
    x = torch.randn(N, 200) * torch.logspace(-3, 3, 200)
    rows, columns = reference.quantize(x, ENDS, rows=operand, columns=operand)
    assert rows is not None
    assert columns is not None
    assert torch.equal(columns.ends_e, piece_ends(ENDS))
    for (start, end), last in zip(groups(), columns.ends_e.tolist()):
        size = end - start
        if not size:
            continue
        along = quantize(x[start:end], operand).dequantized()
        assert torch.equal(dequantized(rows.values[start:end], rows.scales[start:end]), along)
        across = quantize(x[start:end].mT, operand).dequantized()
        pieces = slice(last - -(-size // PIECE), last)
        tokens = slice(pieces.start * PIECE, pieces.stop * PIECE)
        found = dequantized(columns.values[:, tokens], columns.scales[:, pieces])
        assert torch.equal(found[:, :size], across)
        assert (found[:, size:] == 0).all()


def test_products_of_a_group_are_those_of_its_operands() -> None:
    tile, block = OperandConfig("e4m3", "tile", False), OperandConfig("e4m3", "block", False)
    x, dy, w = torch.randn(N, 200), torch.randn(N, 140), torch.randn(len(SIZES), 140, 200)
    rows, columns = reference.quantize(x, ENDS, rows=tile, columns=tile)
    _, gradients = reference.quantize(dy, ENDS, rows=None, columns=tile)
    forward, backward = reference.round_weights(w, block, block)
    assert rows is not None
    assert columns is not None
    assert gradients is not None
    assert forward is not None
    assert backward is not None
    y = reference.grouped_product(rows, forward, ENDS, torch.float32)
    dw = reference.grouped_weight_product(gradients, columns)
    for group, (start, end) in enumerate(groups()):
        narrow = quantize(x[start:end], tile).dequantized()
        torch.testing.assert_close(y[start:end], narrow @ quantize(w[group], block).dequantized().mT)
        left = quantize(dy[start:end].mT, tile).dequantized() if end > start else torch.zeros(140, 0)
        right = quantize(x[start:end].mT, tile).dequantized() if end > start else torch.zeros(200, 0)
        torch.testing.assert_close(dw[group], left @ right.mT)
    assert (y[ENDS[-1] :] == 0).all()
    assert torch.equal(dequantized(backward.values, backward.scales), quantize(w.mT, block).dequantized())


def test_room_is_made_for_the_most_pieces_there_can_be() -> None:
    for sizes in ([1, 1, 1], [127, 129, 0], [128, 128], [300]):
        ends_e = torch.tensor(sizes).cumsum(0, dtype=torch.int32)
        assert piece_ends(ends_e)[-1] <= pieces_at_most(sum(sizes), len(sizes))


@pytest.mark.parametrize("gated", [True, False])
def test_the_gradient_of_swiglu_is_that_of_its_definition(gated: bool) -> None:
    gate_up = torch.randn(9, 26, dtype=torch.float64)
    gate = torch.rand(9, 1, dtype=torch.float64) if gated else None
    dh = torch.randn(9, 13, dtype=torch.float64)
    h, d_gate_up, d_gate = by_autograd(dh, gate_up, gate)
    torch.testing.assert_close(reference.swiglu(gate_up, gate), h, rtol=1e-5, atol=1e-6)
    found, found_gate = reference.swiglu_backward(dh, gate_up, gate)
    torch.testing.assert_close(found, d_gate_up, rtol=1e-5, atol=1e-5)
    if gated:
        torch.testing.assert_close(found_gate, d_gate, rtol=1e-5, atol=1e-5, check_dtype=False)
