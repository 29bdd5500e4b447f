"""FP8 products by torch's scaled matmul: one scale a row or a tensor; cuBLAS and CUTLASS on a GPU, oneDNN on a CPU.

Linear layers are one call. Experts are one call of the grouped form where torch has it, which is compute capability 9.0
and 10.0, and a call for each group elsewhere, whose sizes are then read on the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from moe_train.kernels.layouts import PIECE, Columns, Rows, Weights
from moe_train.precision.emulated import Emulated

# Of outputs and inner dimensions, on a GPU; torch refuses others.
MULTIPLE = 16


class Cublas(Emulated):
    """A backend (precision/backends.py) for scales of rows or tensors, which rounds like the emulated one.

    On a GPU torch writes such products in BF16 alone, so a weight gradient is rounded once more. Not run on a GPU yet.
    """

    name = "cublas"

    def __init__(self, capability: tuple[int, int] | None) -> None:
        super().__init__()
        self.out_dtype = torch.float32 if capability is None else torch.bfloat16
        self.multiplies_in = "float32" if capability is None else "float8"
        self.has_grouped = capability in ((9, 0), (10, 0))

    def product(self, left: Rows, right: Weights, ends_e: Tensor, dtype: torch.dtype) -> Tensor:
        weights = right.values.contiguous()
        if self.has_grouped and len(ends_e) > 1:
            grouped: Tensor = F.scaled_grouped_mm(  # type: ignore[attr-defined]
                left.values,
                weights.mT,
                left.scales[:, 0].contiguous(),
                ScalingType.RowWise,
                right.scales[..., 0].contiguous(),
                ScalingType.RowWise,
                offs=ends_e,
                output_dtype=self.out_dtype,
            )
            return grouped.to(dtype)
        out = left.scales.new_zeros(len(left.values), weights.shape[1], dtype=dtype)
        for group, (start, end) in enumerate(self._bounds(ends_e, len(left.values))):
            if end > start:
                part = self._multiply(
                    left.values[start:end], left.scales[start:end, :1], weights[group], right.scales[group, :, :1]
                )
                out[start:end] = part
        return out

    def weight_product(self, left: Columns, right: Columns) -> Tensor:
        groups, outputs, inputs = len(left.ends_e), len(left.values), len(right.values)
        if self.has_grouped and groups > 1:
            first = left.ends_e.roll(1)
            first[0] = 0
            # A group without rows has no scale; torch wants one and multiplies nothing by it.
            first = first.clamp_max(left.scales.shape[1] - 1).long()
            grouped: Tensor = F.scaled_grouped_mm(  # type: ignore[attr-defined]
                left.values,
                right.values.mT,
                left.scales[:, first].mT.flatten(),
                ScalingType.RowWise,
                right.scales[:, first].mT.flatten(),
                ScalingType.RowWise,
                offs=left.ends_e * PIECE,
                output_dtype=self.out_dtype,
            )
            return grouped.to(torch.float32)
        out = left.scales.new_zeros(groups, outputs, inputs)
        for group, (first_piece, last) in enumerate(self._bounds(left.ends_e, left.scales.shape[1])):
            if last > first_piece:
                tokens, one = slice(first_piece * PIECE, last * PIECE), slice(first_piece, first_piece + 1)
                out[group] = self._multiply(
                    left.values[:, tokens], left.scales[:, one], right.values[:, tokens], right.scales[:, one]
                )
        return out

    def _bounds(self, ends_e: Tensor, all_of_them: int) -> list[tuple[int, int]]:
        """The only group is known to hold everything, without asking the device."""
        ends = ends_e.tolist() if len(ends_e) > 1 else [all_of_them]
        return list(zip([0, *ends[:-1]], ends))

    def _multiply(self, left_rk: Tensor, left_scales: Tensor, right_ck: Tensor, right_scales: Tensor) -> Tensor:
        out: Tensor = F.scaled_mm(
            left_rk.contiguous(),
            right_ck.contiguous().mT,
            _packed(left_scales),
            ScalingType.RowWise,
            _packed(right_scales.mT),
            ScalingType.RowWise,
            output_dtype=self.out_dtype,
        )
        return out


def _packed(scales: Tensor) -> Tensor:
    """With the strides torch asks for where a dimension is 1 as well, which `contiguous` leaves as they are."""
    return scales.clone(memory_format=torch.contiguous_format)
