"""SwiGLU with the router's gate, forward and backward, written as numbers or straight as FP8.

    h = silu(g) · u · gate        gate_up (n, 2f) = [g, u], gate (n, 1) or none
    d_g = dh · gate · u · s · (1 + g (1 - s)),   d_u = dh · gate · g · s,   d_gate = Σ dh · g · s · u,   s = sigmoid(g)

All in FP32, rounded once to the format of gate_up. The forms that end in FP8 round that number, so they are bit for bit
`quantize` of the others', but read and write memory once. d_gate is summed over 128 columns at a time, then over these:
the same order every time. On an H200, 393,216 rows of width 256 in BF16: forward 0.15 ms, the time of its bytes,
backward 0.31 ms, and 0.37 where it makes h again as well.

    n rows of all groups, f width of an expert, e groups
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_train.config import OperandConfig
from moe_train.kernels.capability import check
from moe_train.kernels.device import narrow, widen
from moe_train.kernels.layouts import PIECE, Columns, Rows, pieces_at_most
from moe_train.kernels.pieces import pieces as rows_of_pieces
from moe_train.kernels.pieces import rows_of
from moe_train.kernels.quantize import quantize
from moe_train.kernels.rounding import Outputs, parts_of, round_block, rows_of_piece

EXACT = {"enable_fp_fusion": False}  # without fused multiply-adds a formula gives the same number in every kernel


@triton.jit
def _parts(gate_up, row, column, end, f):
    """g and u of a block in FP32, zero beyond the edges."""
    at = gate_up + row.to(tl.int64)[:, None] * (2 * f) + column[None, :]
    inside = (row < end)[:, None] & (column < f)[None, :]
    return widen(tl.load(at, mask=inside, other=0.0)), widen(tl.load(at + f, mask=inside, other=0.0))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _forward(gate_up, gate, row, column, end, f):
    """A block of h, rounded to the format of gate_up."""
    g, u = _parts(gate_up, row, column, end, f)
    h = g * _sigmoid(g) * u
    if gate is not None:
        h = h * widen(tl.load(gate + row, mask=row < end, other=0.0))[:, None]
    return narrow(h, gate_up.dtype.element_ty)


@triton.jit
def _of_gate(dh, g, u, s):
    return dh * u * s * (1.0 + g * (1.0 - s))


@triton.jit
def _of_up(dh, g, s):
    return dh * (g * s)


@triton.jit
def _write_share(d_gate, dh, g, u, s, row, column, end, f):
    """What these 128 columns add to the gradient of each row's gate."""
    at = d_gate + row.to(tl.int64) * tl.cdiv(f, 128) + tl.max(column, 0) // 128
    tl.store(at, tl.sum(dh * (g * s) * u, 1), mask=row < end)


@triton.jit
def _backward(dh_ptr, gate_up, gate, d_gate, row, column, end, f, HALF: tl.constexpr, SHARES: tl.constexpr):
    """A block of d_g (HALF 0; with SHARES it also writes d_gate's of these columns) or of d_u, rounded like gate_up."""
    g, u = _parts(gate_up, row, column, end, f)
    at = dh_ptr + row.to(tl.int64)[:, None] * f + column[None, :]
    dh = widen(tl.load(at, mask=(row < end)[:, None] & (column < f)[None, :], other=0.0))
    s = _sigmoid(g)
    if gate is not None:
        if HALF == 0 and SHARES:
            _write_share(d_gate, dh, g, u, s, row, column, end, f)
        dh = dh * widen(tl.load(gate + row, mask=row < end, other=0.0))[:, None]
    d = _of_gate(dh, g, u, s) if HALF == 0 else _of_up(dh, g, s)
    return narrow(d, gate_up.dtype.element_ty)


@triton.jit
def _forward_kernel(gate_up, gate, out, n, f, M: tl.constexpr):
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * 128 + tl.arange(0, 128)
    h = _forward(gate_up, gate, row, column, n, f)
    tl.store(out + row.to(tl.int64)[:, None] * f + column[None, :], h, mask=(row < n)[:, None] & (column < f)[None, :])


@triton.jit
def _backward_kernel(dh_ptr, gate_up, gate, d_gate, h_ptr, out, n, f, M: tl.constexpr):
    """Both halves, and h again where it is wanted, from one visit."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * 128 + tl.arange(0, 128)
    inside = (row < n)[:, None] & (column < f)[None, :]
    narrow_at = row.to(tl.int64)[:, None] * f + column[None, :]
    g, u = _parts(gate_up, row, column, n, f)
    dh = widen(tl.load(dh_ptr + narrow_at, mask=inside, other=0.0))
    s = _sigmoid(g)
    h = g * s * u
    if gate is not None:
        _write_share(d_gate, dh, g, u, s, row, column, n, f)
        weight = widen(tl.load(gate + row, mask=row < n, other=0.0))[:, None]
        dh = dh * weight
        h = h * weight
    at = out + row.to(tl.int64)[:, None] * (2 * f) + column[None, :]
    tl.store(at, narrow(_of_gate(dh, g, u, s), out.dtype.element_ty), mask=inside)
    tl.store(at + f, narrow(_of_up(dh, g, s), out.dtype.element_ty), mask=inside)
    if h_ptr is not None:
        tl.store(h_ptr + narrow_at, narrow(h, h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _forward_quantize_kernel(
    gate_up, gate, piece_ptr, n, f, groups,
    row_values, row_scales, column_values, column_scales, inner, largest_row, largest_column, largest_group,
    ROWS: tl.constexpr, ROWS_E4M3: tl.constexpr, ROWS_POWER: tl.constexpr,
    COLUMNS: tl.constexpr, COLUMNS_E4M3: tl.constexpr, COLUMNS_POWER: tl.constexpr,
    NATIVE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """M rows of a block for a product over its columns."""
    piece = tl.program_id(0) // (128 // M)
    group, start, end = rows_of(piece_ptr, piece)
    if group < groups:
        row = start + tl.program_id(0) % (128 // M) * M + tl.arange(0, M)
        block = tl.program_id(1)
        column = block * 128 + tl.arange(0, 128)
        h = widen(_forward(gate_up, gate, row, column, end, f))
        round_block(
            h, row, end, column, block, f, group, piece,
            row_values, row_scales, column_values, column_scales, inner, largest_row, largest_column, largest_group,
            ROWS, ROWS_E4M3, ROWS_POWER, COLUMNS, COLUMNS_E4M3, COLUMNS_POWER, NATIVE,
        )  # fmt: skip


@triton.jit
def _round_gradient(
    dh, gate_up, gate, d_gate, row, column, end, block, piece, f, group,
    row_values, row_scales, column_values, column_scales, inner, largest_row, largest_column, largest_group,
    ROWS: tl.constexpr, ROWS_E4M3: tl.constexpr, ROWS_POWER: tl.constexpr,
    COLUMNS: tl.constexpr, COLUMNS_E4M3: tl.constexpr, COLUMNS_POWER: tl.constexpr,
    NATIVE: tl.constexpr, HALF: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    d = _backward(dh, gate_up, gate, d_gate, row, column, end, f, HALF, SHARES)
    round_block(
        widen(d), row, end, column + HALF * f, block + HALF * (f // 128), 2 * f, group, piece,
        row_values, row_scales, column_values, column_scales, inner, largest_row, largest_column, largest_group,
        ROWS, ROWS_E4M3, ROWS_POWER, COLUMNS, COLUMNS_E4M3, COLUMNS_POWER, NATIVE,
    )  # fmt: skip


@triton.jit
def _backward_quantize_kernel(
    dh, gate_up, gate, d_gate, piece_ptr, n, f, groups,
    row_values, row_scales, column_values, column_scales, inner, largest_row, largest_column, largest_group,
    ROWS: tl.constexpr, ROWS_E4M3: tl.constexpr, ROWS_POWER: tl.constexpr,
    COLUMNS: tl.constexpr, COLUMNS_E4M3: tl.constexpr, COLUMNS_POWER: tl.constexpr,
    NATIVE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Both halves of a block for both layouts (M and N 128), or of M of its rows for one or N of its columns for the
    other. What d_gate gets is summed where there are whole rows.
    """
    TOGETHER: tl.constexpr = M == 128
    FOR_ROWS: tl.constexpr = 128 // M
    PARTS: tl.constexpr = FOR_ROWS + 128 // N if COLUMNS is not None and not TOGETHER else FOR_ROWS
    part = tl.program_id(0) % (2 * PARTS)
    half = part // PARTS
    part = part % PARTS
    block = tl.program_id(0) // (2 * PARTS) % tl.cdiv(f, 128)
    piece = tl.program_id(0) // (2 * PARTS) // tl.cdiv(f, 128)
    group, start, end = rows_of(piece_ptr, piece)
    column = block * 128 + tl.arange(0, 128)
    if group < groups:
        for HALF in tl.static_range(2):
            if half == HALF:
                if TOGETHER:
                    _round_gradient(
                        dh, gate_up, gate, d_gate, rows_of_piece(start), column, end, block, piece, f, group,
                        row_values, row_scales, column_values, column_scales, inner,
                        largest_row, largest_column, largest_group,
                        ROWS, ROWS_E4M3, ROWS_POWER, COLUMNS, COLUMNS_E4M3, COLUMNS_POWER, NATIVE, HALF, True,
                    )  # fmt: skip
                elif part < FOR_ROWS:
                    row = start + part * M + tl.arange(0, M)
                    _round_gradient(
                        dh, gate_up, gate, d_gate, row, column, end, block, piece, f, group,
                        row_values, row_scales, column_values, column_scales, inner,
                        largest_row, largest_column, largest_group,
                        ROWS, ROWS_E4M3, ROWS_POWER, None, COLUMNS_E4M3, COLUMNS_POWER, NATIVE, HALF, True,
                    )  # fmt: skip
                else:
                    of_part = block * 128 + (part - FOR_ROWS) * N + tl.max_contiguous(tl.arange(0, N), 4)
                    _round_gradient(
                        dh, gate_up, gate, d_gate, rows_of_piece(start), of_part, end, block, piece, f, group,
                        row_values, row_scales, column_values, column_scales, inner,
                        largest_row, largest_column, largest_group,
                        None, ROWS_E4M3, ROWS_POWER, COLUMNS, COLUMNS_E4M3, COLUMNS_POWER, NATIVE, HALF, False,
                    )  # fmt: skip


def _checked(gate_up_nf2: Tensor, gate_n1: Tensor | None, dh_nf: Tensor | None = None) -> tuple[int, int]:
    n, twice = gate_up_nf2.shape
    check(twice % 2 == 0, f"gate_up: {twice} columns, not two halves")
    check(gate_n1 is None or gate_n1.shape == (n, 1), f"gate: one number for each of {n} rows")
    check(dh_nf is None or dh_nf.shape == (n, twice // 2), f"dh: {n} rows of {twice // 2}")
    return n, twice // 2


def swiglu(gate_up_nf2: Tensor, gate_n1: Tensor | None) -> Tensor:
    """silu(g) · u · gate → (n, f) in the format of gate_up. Raises ValueError."""
    n, f = _checked(gate_up_nf2, gate_n1)
    out = gate_up_nf2.new_empty(n, f)
    if out.numel():
        grid = (triton.cdiv(n, 32), triton.cdiv(f, PIECE))
        gate = None if gate_n1 is None else gate_n1.contiguous()
        _forward_kernel[grid](gate_up_nf2.contiguous(), gate, out, n, f, M=32, num_warps=8, **EXACT)
    return out


def swiglu_backward(dh_nf: Tensor, gate_up_nf2: Tensor, gate_n1: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """→ d_gate_up (n, 2f) in the format of gate_up, d_gate (n, 1) in FP32 or None. Raises ValueError."""
    return _differentiated(dh_nf, gate_up_nf2, gate_n1, None)


def swiglu_backward_and_forward(
    dh_nf: Tensor, gate_up_nf2: Tensor, gate_n1: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """→ what `swiglu_backward` gives, and h (n, f) as `swiglu` gives it, to the bit. Raises ValueError."""
    n, f = _checked(gate_up_nf2, gate_n1, dh_nf)
    h = gate_up_nf2.new_empty(n, f)
    return *_differentiated(dh_nf, gate_up_nf2, gate_n1, h), h


def _differentiated(
    dh_nf: Tensor, gate_up_nf2: Tensor, gate_n1: Tensor | None, h_nf: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`swiglu_backward`, which also fills h_nf."""
    n, f = _checked(gate_up_nf2, gate_n1, dh_nf)
    out = torch.empty_like(gate_up_nf2, memory_format=torch.contiguous_format)
    gate, shares = _gate(gate_n1, n, f)
    if out.numel():
        grid = (triton.cdiv(n, 16), triton.cdiv(f, PIECE))
        arguments = (dh_nf.contiguous(), gate_up_nf2.contiguous(), gate, shares, h_nf, out, n, f)
        # 16 numbers of a block a thread, two accesses of 16 bytes for each tensor in BF16.
        _backward_kernel[grid](*arguments, M=16, num_warps=4, **EXACT)
    return out, None if shares is None else shares.sum(1, keepdim=True)


def _gate(gate_n1: Tensor | None, n: int, f: int) -> tuple[Tensor | None, Tensor | None]:
    """The gate, and room for what each 128 columns add to its gradient; rows that no kernel reaches have none."""
    if gate_n1 is None:
        return None, None
    return gate_n1.contiguous(), gate_n1.new_zeros((n, triton.cdiv(f, PIECE)), dtype=torch.float32)


def _in_one_pass(rows: OperandConfig | None, columns: OperandConfig | None) -> bool:
    """Whether a block knows its scales."""
    return all(operand is None or operand.scale_of in ("tile", "block") for operand in (rows, columns))


def swiglu_quantize(
    gate_up_nf2: Tensor,
    gate_n1: Tensor | None,
    ends_e: Tensor,
    rows: OperandConfig,
) -> Rows:
    """`quantize` of `swiglu` along f, in one pass where scales are of tiles or blocks. Raises ValueError.

    Along tokens the weight gradient rounds what was rounded along f again, as of any input (`quantize_again`).
    """
    n, f = _checked(gate_up_nf2, gate_n1)
    if not _in_one_pass(rows, None) or not n * f:
        h = swiglu(gate_up_nf2, gate_n1)
        straight, _ = quantize(h, ends_e, rows=rows, columns=None)
        assert straight is not None
        return straight
    check(ends_e.dtype == torch.int32, "ends_e: int32")
    e = len(ends_e)
    pieces = pieces_at_most(n, e)
    outputs = Outputs(gate_up_nf2, (n, f, pieces, e), rows, None)
    gate = None if gate_n1 is None else gate_n1.contiguous()
    arguments = (gate_up_nf2.contiguous(), gate, rows_of_pieces(ends_e, n, PIECE, pieces)[0], n, f, e)
    parts = parts_of(rows, None, warps=8)
    grid = (pieces * parts.programs, triton.cdiv(f, PIECE))
    _forward_quantize_kernel[grid](*arguments, **outputs.arguments, **parts.sizes, **EXACT)
    straight, _ = outputs.layouts(ends_e)
    assert straight is not None
    return straight


def swiglu_backward_quantize(
    dh_nf: Tensor,
    gate_up_nf2: Tensor,
    gate_n1: Tensor | None,
    ends_e: Tensor,
    *,
    rows: OperandConfig | None,
    columns: OperandConfig | None,
) -> tuple[Rows | None, Columns | None, Tensor | None]:
    """`quantize` of d_gate_up and d_gate, in one pass where scales are of tiles or blocks and f is a multiple of 128.

    d_gate of rows that belong to no group is zero if their dh is. Raises ValueError.
    """
    n, f = _checked(gate_up_nf2, gate_n1, dh_nf)
    if not _in_one_pass(rows, columns) or f % PIECE or not n * f:
        d_gate_up, d_gate = swiglu_backward(dh_nf, gate_up_nf2, gate_n1)
        return *quantize(d_gate_up, ends_e, rows=rows, columns=columns), d_gate
    check(ends_e.dtype == torch.int32, "ends_e: int32")
    e = len(ends_e)
    pieces = pieces_at_most(n, e)
    outputs = Outputs(gate_up_nf2, (n, 2 * f, pieces, e), rows, columns)
    gate, shares = _gate(gate_n1, n, f)
    table, piece_ends_e = rows_of_pieces(ends_e, n, PIECE, pieces)
    operands = (dh_nf.contiguous(), gate_up_nf2.contiguous(), gate, shares)
    arguments = (*operands, table, n, f, e)
    parts = parts_of(rows, columns, warps=8)
    # Rows are visited for d_gate even where their layout is not wanted.
    programs = parts.programs if rows or parts.rows == PIECE else parts.programs + PIECE // parts.rows
    grid = (2 * pieces * programs * (f // PIECE),)
    # 80 registers a thread let three programs run beside each other on a core; it would take 92.
    limit = {} if parts.rows == PIECE else {"maxnreg": 80}
    _backward_quantize_kernel[grid](*arguments, **outputs.arguments, **parts.sizes, **limit, **EXACT)
    return *outputs.layouts(piece_ends_e), None if shares is None else shares.sum(1, keepdim=True)
