"""The three products of a linear layer in one format, for all rows at once or for groups of rows with a weight each.

Without `ends_e` there is one group and its weight is (o, i); else weights are (e, o, i). What does groups:

- on a CPU, products whose shapes repeat. oneDNN compiles a kernel for every new shape of a BF16 product and keeps the
  last thousand. The rows an expert gets change at every step, so torch's grouped matmul spends its time compiling:
  0.71 ms for a new shape against 0.13 ms for a known one (1,000 × 128 × 128, two AVX-512 cores). Here every group is
  cut at a multiple of `ROWS`, which leaves a few dozen shapes in all. In FP32 it is as fast as torch's; in FP64, which
  torch's lacks, it serves gradient checks.
- on GPUs of compute capability 9.x and 10.x, torch's grouped matmul; on others that one copies the groups' ends to the
  host and goes round them, and the project's kernel reads them on the device.

What is not torch's is an operator of torch's library, which torch.compile takes as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.precision.support import takes_torchs_grouped_matmul

ROWS = 64


def product(x_ni: Tensor, weight: Tensor, ends_e: Tensor | None) -> Tensor:
    """(n, i) → (n, o): rows times their weight transposed."""
    if ends_e is None:
        return x_ni @ weight.mT
    if takes_torchs_grouped_matmul(x_ni.device):
        return F.grouped_mm(x_ni, weight.mT, offs=ends_e)
    out: Tensor = _product(x_ni, weight, ends_e)
    return out


def input_gradient(grad_no: Tensor, weight: Tensor, ends_e: Tensor | None) -> Tensor:
    """(n, o) → (n, i)."""
    if ends_e is None:
        return grad_no @ weight
    if takes_torchs_grouped_matmul(grad_no.device):
        return F.grouped_mm(grad_no, weight, offs=ends_e)
    out: Tensor = _product(grad_no, weight.mT, ends_e)
    return out


def weight_gradient(grad_no: Tensor, x_ni: Tensor, ends_e: Tensor | None) -> Tensor:
    """(n, o), (n, i) → (o, i) or (e, o, i); zeros for a group without rows."""
    if ends_e is None:
        return (x_ni.mT @ grad_no).mT  # as torch's own backward pass has it, to the bit
    if takes_torchs_grouped_matmul(grad_no.device):
        return F.grouped_mm(grad_no.mT, x_ni, offs=ends_e)
    out: Tensor = _weight_gradient(grad_no, x_ni, ends_e)
    return out


@torch.library.custom_op("moe_train::grouped_product", mutates_args=())
def _product(x_nk: Tensor, weight_eok: Tensor, ends_e: Tensor) -> Tensor:
    if x_nk.device.type == "cuda":
        from moe_train.kernels import grouped_matmul

        return grouped_matmul.grouped_product(x_nk, weight_eok, ends_e)
    out = x_nk.new_empty(len(x_nk), weight_eok.shape[1])
    for expert, start, end in _pieces(ends_e):
        torch.mm(x_nk[start:end], weight_eok[expert].t(), out=out[start:end])
    return out


@_product.register_fake
def _(x_nk: Tensor, weight_eok: Tensor, ends_e: Tensor) -> Tensor:
    return x_nk.new_empty(len(x_nk), weight_eok.shape[1])


@torch.library.custom_op("moe_train::grouped_weight_gradient", mutates_args=())
def _weight_gradient(grad_no: Tensor, x_ni: Tensor, ends_e: Tensor) -> Tensor:
    if x_ni.device.type == "cuda":
        from moe_train.kernels import grouped_matmul

        return grouped_matmul.grouped_weight_product(grad_no, x_ni, ends_e, grad_no.dtype)
    out = grad_no.new_zeros(len(ends_e), grad_no.shape[1], x_ni.shape[1])
    for expert, start, end in _pieces(ends_e):
        out[expert].addmm_(grad_no[start:end].t(), x_ni[start:end])
    return out


@_weight_gradient.register_fake
def _(grad_no: Tensor, x_ni: Tensor, ends_e: Tensor) -> Tensor:
    return grad_no.new_empty(len(ends_e), grad_no.shape[1], x_ni.shape[1])


def _pieces(ends_e: Tensor) -> list[tuple[int, int, int]]:
    """(expert, start, end) of the row ranges to multiply: per group whole multiples of ROWS, then what is left."""
    pieces = []
    start = 0
    for expert, end in enumerate(ends_e.tolist()):
        cut = start + (end - start) // ROWS * ROWS
        pieces += [(expert, s, e) for s, e in ((start, cut), (cut, end)) if e > s]
        start = end
    return pieces
