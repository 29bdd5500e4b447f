"""The kernels of kernels/reference.py in C: operands rounded to FP8, with what rounding lost of them, and multiplied.

What is rounded is the reference's bit for bit. Products differ in the order of their FP32 sums, and in that a scale is
multiplied with a sum over 128 numbers rather than with each of them.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moe_train.config import OperandConfig
from moe_train.kernels.cpu import library
from moe_train.kernels.layouts import DTYPES, PIECE, Columns, Rows, Weights, pieces_at_most

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2, torch.float8_e5m2: 3}
_SHARED = {"tile": 1, "block": 2, "row": 3, "tensor": 4}


class _Source(ctypes.Structure):
    """`Source` in fp8_source.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "inner", "groups", "format", "stride")),
        *((name, ctypes.c_void_p) for name in ("next", "x", "scales", "ends")),
    ]


class _Layout(ctypes.Structure):
    """`Layout` in fp8_round.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("shared", "e5m2", "power_of_two")),
        *((name, ctypes.c_void_p) for name in ("values", "scales")),
    ]


class _Rounding(ctypes.Structure):
    """`Rounding` in fp8_round.c."""

    _anonymous_ = ("source",)
    _fields_ = [
        ("source", _Source),
        ("largest", ctypes.c_void_p),
        ("pieces", ctypes.c_int64),
        ("piece_ends", ctypes.c_void_p),
        ("along_rows", _Layout),
        ("along_tokens", _Layout),
    ]


class _Widening(ctypes.Structure):
    """`Widening` in fp8_read.c."""

    _anonymous_ = ("source",)
    _fields_ = [("source", _Source), ("narrow", ctypes.c_int64), ("to", ctypes.c_void_p)]


class _Counting(ctypes.Structure):
    """`Counting` in fp8_read.c."""

    _anonymous_ = ("source",)
    _fields_ = [
        ("source", _Source),
        *((name, ctypes.c_int64) for name in ("e5m2", "turned", "values_stride", "scales_stride")),
        *((name, ctypes.c_void_p) for name in ("values", "scales_of_values", "counts")),
    ]


class _Gated(ctypes.Structure):
    """`Gated` in fp8_swiglu.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width", "parts", "narrow")),
        *((name, ctypes.c_void_p) for name in ("next", "gate_up", "weight", "h", "grad_h")),
        *((name, ctypes.c_void_p) for name in ("grad_gate_up", "grad_weight")),
    ]


class _Operand(ctypes.Structure):
    """`Operand` in fp8_products.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "scales")),
        *((name, ctypes.c_int64) for name in ("stride", "scale_stride", "scale_step", "e5m2")),
    ]


class _Product(ctypes.Structure):
    """`Product` in fp8_products.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("groups", "rows", "inner", "outer", "slices", "narrow")),
        *((name, ctypes.c_void_p) for name in ("next", "ends")),
        ("left", _Operand),
        ("right", _Operand),
        *((name, ctypes.c_int64) for name in ("right_group", "scales_group")),
        ("out", ctypes.c_void_p),
    ]


def quantize(
    x_nk: Tensor,
    ends_e: Tensor,
    *,
    rows: OperandConfig | None,
    columns: OperandConfig | None,
) -> tuple[Rows | None, Columns | None]:
    """See kernels/quantize.py. Rows that belong to no group are zeros. Raises MemoryError."""
    return _round(_computable(x_nk), None, ends_e, rows, columns)


def quantize_again(rows: Rows, ends_e: Tensor, columns: OperandConfig) -> Columns:
    """See kernels/quantize.py."""
    _, found = _round(_readable(rows.values), rows.scales.contiguous(), ends_e, None, columns)
    assert found is not None
    return found


def round_weights(
    w_eoi: Tensor, forward: OperandConfig | None, backward: OperandConfig | None
) -> tuple[Weights | None, Weights | None]:
    """See kernels/quantize.py."""
    e, o, i = w_eoi.shape
    ends_e = torch.arange(1, e + 1, dtype=torch.int32) * o
    rows, columns = quantize(w_eoi.reshape(e * o, i), ends_e, rows=forward, columns=backward)
    straight = turned = None
    if forward and rows:
        shared = forward.scale_of in ("block", "tensor")
        straight = Weights(rows.values.view(e, o, i), rows.scales.view(e, o, -1), shared)
    if backward and columns:
        blocks = -(-o // PIECE)
        values = columns.values[:, : e * blocks * PIECE].unflatten(1, (e, -1))[:, :, :o].permute(1, 0, 2)
        scales = columns.scales[:, : e * blocks].unflatten(1, (e, -1)).permute(1, 0, 2)
        turned = Weights(values, scales, backward.scale_of in ("block", "tensor"))
    return straight, turned


def _round(
    x_nk: Tensor, x_scales: Tensor | None, ends_e: Tensor, rows: OperandConfig | None, columns: OperandConfig | None
) -> tuple[Rows | None, Columns | None]:
    (n, k), groups, ends_e = x_nk.shape, len(ends_e), ends_e.contiguous()
    pieces = pieces_at_most(n, groups)
    piece_ends_e = torch.empty_like(ends_e)
    straight = turned = None
    arguments = _Rounding(_source(x_nk, x_scales, ends_e), pieces=pieces, piece_ends=piece_ends_e.data_ptr())
    if rows:
        straight = Rows(x_nk.new_empty(n, k, dtype=DTYPES[rows.format]), _scales(n, -(-k // PIECE)))
        arguments.along_rows = _layout(rows, *straight)
    if columns:
        values = x_nk.new_empty(k, pieces * PIECE, dtype=DTYPES[columns.format])
        turned = Columns(values, _scales(k, pieces), piece_ends_e)
        arguments.along_tokens = _layout(columns, values, turned.scales)
    of_whole_groups = (rows and rows.scale_of == "tensor") or (columns and columns.scale_of in ("row", "tensor"))
    if of_whole_groups:
        largest = torch.empty(groups, k, dtype=torch.int32)
        arguments.largest = largest.data_ptr()
        library.call_on_cores("fp8_largest", arguments)
    library.call_on_cores("fp8_round", arguments)
    return straight, turned


def dequantize(rows: Rows, dtype: torch.dtype) -> Tensor:
    """Values times scales (n, k), rounded to `dtype` at the end."""
    values, scales = _readable(rows.values), rows.scales.contiguous()
    to = values.new_empty(values.shape, dtype=dtype if dtype == torch.bfloat16 else torch.float32)
    all_of_them = torch.tensor([len(values)], dtype=torch.int32)
    library.call_on_cores(
        "fp8_widen", _Widening(_source(values, scales, all_of_them), dtype == torch.bfloat16, to.data_ptr())
    )
    return to.to(dtype)


def counts(x: Tensor) -> bool:
    """Whether `count` is used for operands like x."""
    return library.in_use() is not None and x.device.type == "cpu"


def count(x_nk: Tensor, rounded: Rows | Columns, ends_e: Tensor) -> list[int]:
    """Numbers of x that are not zero; as stored: that are not zero, or not finite; cut off: what health.py counts."""
    x_nk, values, found = _computable(x_nk), _readable(rounded.values), (ctypes.c_int64 * 4)()
    turned, ends_e = isinstance(rounded, Columns), ends_e.contiguous()
    scales = rounded.scales if rounded.scales.stride(1) == 1 else rounded.scales.contiguous()
    library.call_on_cores(
        "fp8_count",
        _Counting(
            _source(x_nk, None, ends_e),
            *(values.dtype == torch.float8_e5m2, turned, values.stride(0), scales.stride(0)),
            values=values.data_ptr(),
            scales_of_values=scales.data_ptr(),
            counts=ctypes.addressof(found),
        ),
    )
    return list(found)


def product(left: Rows, right: Weights, ends_e: Tensor, dtype: torch.dtype) -> Tensor:
    """See kernels/fp8_matmul.py."""
    (n, k), (groups, o, _), cores = left.values.shape, right.values.shape, torch.get_num_threads()
    rows, values, scales, ends_e = _readable(left.values), _readable(right.values), right.scales, ends_e.contiguous()
    out = torch.empty(n, o, dtype=dtype if dtype == torch.bfloat16 else torch.float32)
    library.call_on_cores(
        "fp8_product",
        _Product(
            *(groups, n, k, o, cores if groups < 2 * cores else 1, dtype == torch.bfloat16),
            ends=ends_e.data_ptr(),
            left=_operand(rows, left.scales),
            right=_operand(values, scales),
            right_group=values.stride(0),
            scales_group=scales.stride(0),
            out=out.data_ptr(),
        ),
    )
    return out.to(dtype)


def weight_product(left: Columns, right: Columns) -> Tensor:
    """See kernels/fp8_matmul.py: (e, o, i) in FP32."""
    groups, o, i, ends_e = len(left.ends_e), len(left.values), len(right.values), left.ends_e.contiguous()
    out = torch.empty(groups, o, i)
    arguments = _Product(groups, o, 0, i, 1, False, ends=ends_e.data_ptr(), out=out.data_ptr())
    of_left, of_right = _readable(left.values), _readable(right.values)
    arguments.left, arguments.right = _operand(of_left, left.scales), _operand(of_right, right.scales)
    library.call_on_cores("fp8_weight_product", arguments)
    return out


def swiglu_quantize(gate_up_nf2: Tensor, gate_n1: Tensor | None, ends_e: Tensor, rows: OperandConfig) -> Rows:
    """See kernels/swiglu.py."""
    gate_up, gate = _computable(gate_up_nf2).contiguous(), None if gate_n1 is None else gate_n1.float().contiguous()
    h = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    arguments = _gated(gate_up, gate)
    arguments.h = h.data_ptr()
    library.call_on_cores("fp8_swiglu_forward", arguments)
    found, _ = quantize(h.to(gate_up_nf2.dtype), ends_e, rows=rows, columns=None)
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
    gate_up, gate = _computable(gate_up_nf2).contiguous(), None if gate_n1 is None else gate_n1.float().contiguous()
    dh = dh_nf.to(gate_up.dtype).contiguous()
    d_gate_up, d_gate = torch.empty_like(gate_up), None if gate is None else torch.empty_like(gate)
    arguments = _gated(gate_up, gate)
    arguments.grad_h, arguments.grad_gate_up = dh.data_ptr(), d_gate_up.data_ptr()
    arguments.grad_weight = _place(d_gate)
    library.call_on_cores("fp8_swiglu_backward", arguments)
    return *quantize(d_gate_up.to(gate_up_nf2.dtype), ends_e, rows=rows, columns=columns), d_gate


def _gated(gate_up: Tensor, gate: Tensor | None) -> _Gated:
    n, f = len(gate_up), gate_up.shape[1] // 2
    narrow = gate_up.dtype == torch.bfloat16
    return _Gated(n, f, torch.get_num_threads(), narrow, gate_up=gate_up.data_ptr(), weight=_place(gate))


def _source(x_nk: Tensor, scales: Tensor | None, ends_e: Tensor) -> _Source:
    places = {"x": x_nk.data_ptr(), "scales": _place(scales), "ends": ends_e.data_ptr()}
    return _Source(*x_nk.shape, len(ends_e), _FORMATS[x_nk.dtype], x_nk.stride(0), **places)


def _computable(x: Tensor) -> Tensor:
    return _readable(x if x.dtype == torch.bfloat16 else x.float())


def _readable(x: Tensor) -> Tensor:
    """Rows whose numbers follow one another."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _scales(rows: int, pieces: int) -> Tensor:
    return torch.empty(rows, pieces, dtype=torch.float32)


def _place(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _layout(operand: OperandConfig, values: Tensor, scales: Tensor) -> _Layout:
    e5m2, places = operand.format == "e5m2", (values.data_ptr(), scales.data_ptr())
    return _Layout(_SHARED[operand.scale_of], e5m2, operand.power_of_two, *places)


def _operand(values: Tensor, scales: Tensor) -> _Operand:
    strides = (values.stride(-2), scales.stride(-2), scales.stride(-1))
    return _Operand(values.data_ptr(), scales.data_ptr(), *strides, values.dtype == torch.float8_e5m2)
