"""Grouped BF16 and FP16 products for compute capability 9.0, where tensors are copied block by block (TMA).

What has no index is read and written through descriptors: one thread asks for a block, which lies in shared memory as
wgmma reads it, and what lies outside is zero when read and left alone when written. Descriptors are arguments of the
kernel, made on the host without asking the device, so a CUDA graph keeps them. Rows of an index are gathered by all
threads as elsewhere, unmasked: beyond a group's end they are some of the group's, not written or multiplied by zeros.
Products are made by programs that stay, which read the next block's operands while they write the last one's results.

One NVIDIA H200, 2026-11-27, 393,216 rows of 96 experts of 256, 1024 wide, BF16, ms a call (when these kernels had more
options, of which these are the best), and those of grouped_matmul.py's as it was and of torch's grouped matmul (which
needs the rows of an index copied: 0.40 more):

    second product of the experts        0.43    0.66    0.51
    input gradient of the first          0.69    0.95    0.83
    first product, rows by an index      0.74    0.84    0.72
    input gradient of the second, too    0.39    0.43    0.39
    weight gradient of the first, too    0.70    1.05    0.97
    weight gradient of the second, too   0.37    0.51    0.50

10.0 and 12.0 have TMA, too, but none of this was measured there.

    n rows of all groups, k inner, e groups, o outputs, i inputs
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged, to_ragged_indices
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_train.kernels.capability import card, cores
from moe_train.kernels.device import dot, narrow
from moe_train.kernels.pieces import pieces, rows_of

DTYPES = (torch.bfloat16, torch.float16)
_ROWS = 128  # of a block of a product
_GATHERED_COLUMNS = 256  # of one whose rows have an index
_INNER = 64  # read at a time: 128 bytes, the widest row of a block that TMA spreads over shared memory's banks
_WEIGHT_ROWS, _WEIGHT_COLUMNS = 128, 256  # of a block of a weight gradient
_ALIGNED = 16  # bytes of an address for TMA; numbers of a row, for gathered rows to be read 16 bytes at a time


def _lies_well(matrix: Tensor) -> bool:
    rows, columns = matrix.stride()
    return (
        matrix.numel() > 0
        and len(matrix) < 2**30  # as many as ragged descriptors have
        and columns == 1
        and rows % _ALIGNED == matrix.shape[1] % _ALIGNED == matrix.data_ptr() % _ALIGNED == 0
        and matrix.shape[1] <= rows < 2**31
    )


def _flat(w_eok: Tensor) -> tuple[Tensor, bool] | None:
    """Weights as a matrix, (e o, k) or (e k, o), and whether it is the first; None if they lie otherwise."""
    if w_eok.is_contiguous():
        return w_eok.view(-1, w_eok.shape[2]), True
    return (w_eok.mT.view(-1, w_eok.shape[1]), False) if w_eok.mT.is_contiguous() else None


def takes_product(x_nk: Tensor, w_eok: Tensor, source_n: Tensor | None = None) -> bool:
    """Whether `product` can be had, and is meant for it: not for fewer rows a group than half a block, nor for gathered
    rows of fewer outputs than that (of 128 × 96 and 32,768 rows 12.8 µs, elsewhere 10.0).
    """
    rows = len(x_nk if source_n is None else source_n)
    return (
        card(x_nk.device).copies_blocks
        and x_nk.dtype in DTYPES
        and x_nk.shape[1] % _INNER == 0
        and w_eok.shape[1] % _ALIGNED == 0
        and len(w_eok) * _ROWS // 2 < rows < 2**30
        and (source_n is None or w_eok.shape[1] > _GATHERED_COLUMNS // 2)
        and _lies_well(x_nk)
        and (flat := _flat(w_eok)) is not None
        and _lies_well(flat[0])
    )


def fill(blocks: int, device: torch.device) -> bool:
    """Whether so many keep at least half the cores busy."""
    return 2 * blocks >= cores(device)


def takes_weight_product(
    left_no: Tensor, right_ni: Tensor, left_source_n: Tensor | None, right_source_n: Tensor | None, groups: int
) -> bool:
    """Whether `weight_product` can be had: one of both operands by an index, whole blocks of its columns.

    Its blocks are large: where they are too few, those of grouped_matmul.py are cut by rows as well.
    """
    if (left_source_n is None) == (right_source_n is None):
        return False
    blocks = groups * triton.cdiv(left_no.shape[1], _WEIGHT_ROWS) * triton.cdiv(right_ni.shape[1], _WEIGHT_COLUMNS)
    gathered, block = (right_ni, _WEIGHT_COLUMNS) if left_source_n is None else (left_no, _WEIGHT_ROWS)
    return (
        card(left_no.device).copies_blocks
        and left_no.dtype in DTYPES
        and fill(blocks, left_no.device)
        and _lies_well(left_no)
        and _lies_well(right_ni)
        and gathered.shape[1] % block == 0
        and len(gathered) * gathered.stride(0) < 2**31  # its offsets are of 32 bits
    )


@triton.jit
def _store(out, row, end, column, value, M: tl.constexpr, N: tl.constexpr):
    """M x N numbers, but for rows from `end` on. (Triton's interpreter does not run Triton's own store_ragged.)"""
    span, last, first = to_ragged_indices(row, end - row, 0)
    out.store([span, last, first, column], tl.reshape(narrow(value, out.dtype), (1, 1, M, N)))


@triton.jit
def _descriptor_product_kernel(
    x, source_ptr, w, piece_ptr, piece_ends_ptr, ends_ptr, out, n, o, groups, x_stride_n,
    K_SIZE: tl.constexpr, K_IS_ROW: tl.constexpr, PROGRAMS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """x: a descriptor, or with a source a pointer. Of w's matrix, k is along rows (K_IS_ROW) or o is."""
    GATHERED: tl.constexpr = source_ptr is not None
    across = tl.cdiv(o, N)
    last_end = tl.load(ends_ptr + groups - 1)
    count = tl.load(piece_ends_ptr + groups - 1) + tl.cdiv(n - last_end, M)
    for tile in tl.range(tl.program_id(0), count * across, PROGRAMS, flatten=not GATHERED):
        group, start, end = rows_of(piece_ptr, tile // across)
        column = (tile % across) * N
        # Behind the last group, weights are read behind the last ones, as zeros; so are rows, unless they are gathered.
        w_row = group * (o if K_IS_ROW else K_SIZE)
        x_row = tl.where(group < groups, start, n)
        if GATHERED:
            near_row = tl.minimum(start + tl.arange(0, M), end - 1)
            x_at = x + tl.load(source_ptr + near_row).to(tl.int64)[:, None] * x_stride_n + tl.arange(0, K)[None, :]
        total = tl.zeros((M, N), dtype=tl.float32)
        for step in range(0, K_SIZE // K):
            left = tl.load(x_at + step * K) if GATHERED else x.load([x_row, step * K])
            right = w.load([w_row + column, step * K]).T if K_IS_ROW else w.load([w_row + step * K, column])
            total = dot(left, right, total)
        if GATHERED:
            total = tl.where(group < groups, total, 0.0)
            _store(out, start, end, column, total, M, N)
        else:  # in halves: less of shared memory is taken by what waits to be written
            halves = tl.permute(tl.reshape(total, (M, 2, N // 2)), (0, 2, 1))
            first, second = tl.split(halves)
            _store(out, start, end, column, first, M, N // 2)
            _store(out, start, end, column + N // 2, second, M, N // 2)


def product(x_nk: Tensor, w_eok: Tensor, ends_e: Tensor, source_n: Tensor | None) -> Tensor:
    """As grouped_matmul.grouped_product has it, of what `takes_product` takes."""
    (e, o, k), n = w_eok.shape, len(x_nk if source_n is None else source_n)
    gathered = source_n is not None
    columns, warps, a_core = (_GATHERED_COLUMNS, 8, 1) if gathered else (128, 4, 2)
    out = x_nk.new_empty(n, o)
    table, piece_ends_e = pieces(ends_e, n, _ROWS, n // _ROWS + min(n, e + 1))
    flat = _flat(w_eok)
    assert flat is not None
    weights, k_is_row = flat
    programs = a_core * cores(x_nk.device)
    _descriptor_product_kernel[(programs,)](
        x_nk if gathered else TensorDescriptor.from_tensor(x_nk, [_ROWS, _INNER]),
        source_n,
        TensorDescriptor.from_tensor(weights, [columns, _INNER] if k_is_row else [_INNER, columns]),
        table,
        piece_ends_e,
        ends_e,
        create_ragged_descriptor(out, [_ROWS, columns if gathered else columns // 2]),
        n,
        o,
        e,
        x_nk.stride(0),
        K_SIZE=k,
        K_IS_ROW=k_is_row,
        PROGRAMS=programs,
        M=_ROWS,
        N=columns,
        K=_INNER,
        num_warps=warps,
        num_stages=3,
    )
    return out


@triton.jit
def _descriptor_weight_kernel(
    left, left_source, right, right_source, ends_ptr, out, o, i, left_stride_n, right_stride_n,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One operand has a source and is a pointer; the other is a ragged descriptor, zero beyond a group's end."""
    across = tl.cdiv(i, N)
    tiles = tl.cdiv(o, M) * across
    group = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row, column = (tile // across) * M, (tile % across) * N
    start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
    end = tl.load(ends_ptr + group)
    tokens = tl.arange(0, K)
    total = tl.zeros((M, N), dtype=tl.float32)
    for first in range(start, end, K):
        near = tl.minimum(first + tokens, end - 1)
        if left_source is not None:
            index = tl.load(left_source + near).to(tl.int32)
            x = tl.load(left + (row + tl.arange(0, M))[:, None] + (index * left_stride_n)[None, :])
            y = load_ragged(right, first, end - first, [0, column])
        else:
            index = tl.load(right_source + near).to(tl.int32)
            x = load_ragged(left, first, end - first, [0, row]).T
            y = tl.load(right + (column + tl.arange(0, N))[None, :] + (index * right_stride_n)[:, None])
        total = dot(x, y, total)
    rows, columns = row + tl.arange(0, M), column + tl.arange(0, N)
    place = (group.to(tl.int64) * o + rows)[:, None] * i + columns[None, :]
    tl.store(out + place, narrow(total, out.dtype.element_ty), mask=(rows < o)[:, None] & (columns < i)[None, :])


def weight_product(
    left_no: Tensor,
    right_ni: Tensor,
    ends_e: Tensor,
    out_dtype: torch.dtype,
    left_source_n: Tensor | None,
    right_source_n: Tensor | None,
) -> Tensor:
    """As grouped_matmul.grouped_weight_product has it, of what `takes_weight_product` takes."""
    e, o, i = len(ends_e), left_no.shape[1], right_ni.shape[1]
    out = left_no.new_empty((e, o, i), dtype=out_dtype)
    _descriptor_weight_kernel[(e * triton.cdiv(o, _WEIGHT_ROWS) * triton.cdiv(i, _WEIGHT_COLUMNS),)](
        create_ragged_descriptor(left_no, [_INNER, _WEIGHT_ROWS]) if left_source_n is None else left_no,
        left_source_n,
        create_ragged_descriptor(right_ni, [_INNER, _WEIGHT_COLUMNS]) if right_source_n is None else right_ni,
        right_source_n,
        ends_e,
        out,
        o,
        i,
        left_no.stride(0),
        right_ni.stride(0),
        M=_WEIGHT_ROWS,
        N=_WEIGHT_COLUMNS,
        K=_INNER,
        num_warps=8,
        num_stages=5,
    )
    return out
