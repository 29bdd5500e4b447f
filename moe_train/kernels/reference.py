"""The kernels in plain PyTorch: the same functions over the same layouts, on any device, group by group.

What the kernels are held to, and the products of FP8 operands where there is no hardware for them: operands are rounded
as moe_train/precision/quantize.py says and multiplied as FP32 numbers. Reads the ends of the groups on the host.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.config import OperandConfig
from moe_train.kernels.layouts import DTYPES, PIECE, Columns, Rows, Weights, piece_ends, pieces_at_most
from moe_train.precision import quantize as rounding
from moe_train.precision.accumulate import Accumulation, product


def _groups(ends_e: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """(group, first row, end, first piece) of every group that has rows."""
    start = piece = 0
    for group, end in enumerate(ends_e.tolist()):
        if end > start:
            yield group, start, end, piece
            piece += -(-(end - start) // PIECE)
            start = end


def _spread(quantized: rounding.Quantized) -> Tensor:
    """A scale for every row and piece, (…, rows, ⌈inner / 128⌉)."""
    *_, rows, inner = quantized.values.shape
    pieces = -(-inner // PIECE)
    scales = quantized.scales.repeat_interleave(quantized.piece[0], -2)[..., :rows, :]
    return scales if scales.shape[-1] == pieces else scales.expand(*scales.shape[:-1], pieces)


def dequantized(values: Tensor, scales: Tensor) -> Tensor:
    """FP32 (…, rows, inner) of FP8 values with a scale for every row and piece."""
    return values.to(torch.float32) * scales.repeat_interleave(PIECE, -1)[..., : values.shape[-1]]


def dequantize(rows: Rows, dtype: torch.dtype) -> Tensor:
    """(n, k), rounded to `dtype` once."""
    return dequantized(*rows).to(dtype)


def quantize(
    x_nk: Tensor,
    ends_e: Tensor,
    *,
    rows: OperandConfig | None,
    columns: OperandConfig | None,
) -> tuple[Rows | None, Columns | None]:
    """See kernels/quantize.py. What belongs to no group is zeros."""
    n, k = x_nk.shape
    pieces = pieces_at_most(n, len(ends_e))
    straight = turned = None
    if rows:
        straight = Rows(
            x_nk.new_zeros(n, k, dtype=DTYPES[rows.format]), x_nk.new_ones(n, -(-k // PIECE), dtype=torch.float32)
        )
    if columns:
        turned = Columns(
            x_nk.new_zeros(k, pieces * PIECE, dtype=DTYPES[columns.format]),
            x_nk.new_ones(k, pieces, dtype=torch.float32),
            piece_ends(ends_e),
        )
    for _, start, end, piece in _groups(ends_e):
        if rows and straight:
            found = rounding.quantize(x_nk[start:end], rows)
            straight.values[start:end] = found.values
            straight.scales[start:end] = _spread(found)
        if columns and turned:
            found = rounding.quantize(x_nk[start:end].mT, columns)
            turned.values[:, piece * PIECE : piece * PIECE + end - start] = found.values
            scales = _spread(found)
            turned.scales[:, piece : piece + scales.shape[1]] = scales
    return straight, turned


def quantize_again(rows: Rows, ends_e: Tensor, columns: OperandConfig) -> Columns:
    """See kernels/quantize.py."""
    _, found = quantize(dequantized(*rows), ends_e, rows=None, columns=columns)
    assert found is not None
    return found


def round_weights(
    w_eoi: Tensor, forward: OperandConfig | None, backward: OperandConfig | None
) -> tuple[Weights | None, Weights | None]:
    """See kernels/quantize.py."""

    def rounded(w: Tensor, operand: OperandConfig | None) -> Weights | None:
        if operand is None:
            return None
        found = rounding.quantize(w, operand)
        return Weights(found.values, _spread(found), operand.scale_of in ("block", "tensor"))

    return rounded(w_eoi, forward), rounded(w_eoi.mT, backward)


def grouped_product(
    left: Rows, right: Weights, ends_e: Tensor, dtype: torch.dtype, accumulation: Accumulation = "float32"
) -> Tensor:
    """See kernels/fp8_matmul.py. accumulation: how tensor cores add up, in precision/accumulate.py."""
    weight = dequantized(right.values, right.scales)
    out = left.scales.new_zeros(len(left.values), weight.shape[1], dtype=dtype)
    for group, start, end, _ in _groups(ends_e):
        x = dequantized(left.values[start:end], left.scales[start:end])
        out[start:end] = product(x, weight[group], accumulation).to(dtype)
    return out


def grouped_weight_product(
    left: Columns, right: Columns, out_dtype: torch.dtype = torch.float32, accumulation: Accumulation = "float32"
) -> Tensor:
    """See kernels/fp8_matmul.py."""
    groups = len(left.ends_e)
    out = left.scales.new_zeros(groups, len(left.values), len(right.values), dtype=out_dtype)
    start = 0
    for group, end in enumerate(left.ends_e.tolist()):
        if end > start:
            tokens = slice(start * PIECE, end * PIECE)
            one, other = (dequantized(x.values[:, tokens], x.scales[:, start:end]) for x in (left, right))
            out[group] = product(one, other, accumulation).to(out_dtype)
            start = end
    return out


def swiglu(gate_up_nf2: Tensor, gate_n1: Tensor | None) -> Tensor:
    """See kernels/swiglu.py."""
    g, u = gate_up_nf2.float().chunk(2, dim=-1)
    h = F.silu(g) * u
    return (h if gate_n1 is None else h * gate_n1.float()).to(gate_up_nf2.dtype)


def swiglu_backward(dh_nf: Tensor, gate_up_nf2: Tensor, gate_n1: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """See kernels/swiglu.py."""
    dh = dh_nf.float()
    g, u = gate_up_nf2.float().chunk(2, dim=-1)
    s = torch.sigmoid(g)
    d_gate = None if gate_n1 is None else (dh * g * s * u).sum(-1, keepdim=True)
    dh = dh if gate_n1 is None else dh * gate_n1.float()
    d_g, d_u = dh * u * s * (1 + g * (1 - s)), dh * g * s
    return torch.cat([d_g, d_u], -1).to(gate_up_nf2.dtype), d_gate


def swiglu_quantize(
    gate_up_nf2: Tensor,
    gate_n1: Tensor | None,
    ends_e: Tensor,
    rows: OperandConfig,
) -> Rows:
    """See kernels/swiglu.py."""
    found, _ = quantize(swiglu(gate_up_nf2, gate_n1), ends_e, rows=rows, columns=None)
    assert found is not None
    return found


def swiglu_backward_quantize(
    dh_nf: Tensor,
    gate_up_nf2: Tensor,
    gate_n1: Tensor | None,
    ends_e: Tensor,
    *,
    rows: OperandConfig | None,
    columns: OperandConfig | None,
) -> tuple[Rows | None, Columns | None, Tensor | None]:
    """See kernels/swiglu.py."""
    d_gate_up, d_gate = swiglu_backward(dh_nf, gate_up_nf2, gate_n1)
    return *quantize(d_gate_up, ends_e, rows=rows, columns=columns), d_gate
