"""The output head's cross-entropy with its gradients, by head.c: what model/loss.py does, with logits in FP32.

Beside its results a call holds the weight in BF16 twice and the gradients of logits of two chunks of rows in BF16,
16 MB whatever the vocabulary, with their rows of hidden states; without gradients the weight once. Each core has a
block of rows of logits in its cache.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_train.kernels.cpu import library
from moe_train.kernels.cut import is_cut
from moe_train.uncompiled import operator

_FEWEST_ROWS = 64  # for which packing the weight pays
_BLOCK_BYTES = 2**19  # of logits: half of a core's second cache
_CHUNK_ELEMENTS = 2**22  # of the gradient of logits between two visits of the weight's gradient
_TILE = 6  # rows


class _Head(ctypes.Structure):
    """`Head` in head.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "inner", "outer", "block", "chunk", "blocks", "chunks")),
        *((name, ctypes.c_void_p) for name in ("next", "done", "x", "weight", "target", "columns", "sums")),
        ("z", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("entries", "grad", "packed_x", "grad_x", "grad_weight")),
    ]


def takes(hidden_td: Tensor, weight_vd: Tensor) -> bool:
    """Whether it is used, and can do it: rows enough on a CPU, the weight in FP32, an even d. hidden_td: in any format.

    Not while the weight is cut over processes; FSDP2 gathers it in BF16.
    """
    return (
        library.in_use() is not None
        and hidden_td.device.type == "cpu"
        and len(hidden_td) >= _FEWEST_ROWS
        and not is_cut(weight_vd)
        and weight_vd.device == hidden_td.device
        and weight_vd.dtype == torch.float32
        and hidden_td.shape[1] == weight_vd.shape[1]
        and weight_vd.shape[1] % 2 == 0
    )


def _call(x: Tensor, weight: Tensor, target: Tensor, z: float, *gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Objective and loss. gradients: where those of x and the weight go, their rows padded."""
    (t, d), v = x.shape, len(weight)
    if target.shape != (t,):
        raise ValueError(f"{t} rows have {t} targets, not {tuple(target.shape)}")
    if int(target.max()) >= v:
        raise IndexError(f"target {int(target.max())} is not one of the head's {v} entries")
    block = max(2 * _TILE, min(_BLOCK_BYTES // (4 * v) // _TILE, 16) * _TILE)
    chunks = -(-t * v // _CHUNK_ELEMENTS)
    chunk = library.up(-(-t // chunks), block)
    chunks, blocks = -(-t // chunk), chunk // block

    def packed(k: int, n: int) -> Tensor:
        return torch.empty(library.up(k, 2) * library.up(n, library.PANEL), dtype=torch.bfloat16)

    sums = torch.zeros(chunks, blocks, 2, dtype=torch.float64)
    done = torch.zeros(1 + 2 * chunks, dtype=torch.int64)
    tensors = {"x": x.contiguous(), "weight": weight.contiguous(), "target": target.long().contiguous()}
    tensors |= {"columns": packed(d, v), "sums": sums, "done": done}
    if gradients:
        tensors |= dict(zip(("grad_x", "grad_weight"), gradients))
        tensors |= {"entries": packed(v, d), "grad": packed(2 * chunk, v), "packed_x": packed(2 * chunk, d)}
    sizes = {"rows": t, "inner": d, "outer": v, "block": block, "chunk": chunk, "blocks": blocks, "chunks": chunks}
    places = {name: each.data_ptr() for name, each in tensors.items()}
    library.call_on_cores("head_loss", _Head(**sizes, **places, z=z))
    objective, nll = sums.sum((0, 1))
    return objective.float(), nll.float()


@operator("moe_train::head_loss")
def head_loss(x: Tensor, weight: Tensor, target: Tensor, z_loss_weight: float) -> tuple[Tensor, Tensor]:
    """Objective and loss, FP32, of x (t, d) in BF16 by weight (v, d) in FP32.

    target: (t), whole numbers, negative for padding. Raises IndexError for one that is not an entry, and ValueError.
    """
    return _call(x, weight, target, z_loss_weight)


@head_loss.register_fake
def _like_losses(x: Tensor, weight: Tensor, target: Tensor, z_loss_weight: float) -> tuple[Tensor, Tensor]:
    return weight.new_empty(()), weight.new_empty(())


@operator("moe_train::head_loss_and_gradients")
def head_loss_and_gradients(
    x: Tensor, weight: Tensor, target: Tensor, z_loss_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Beside them the objective's gradients of x and the weight, FP32."""
    wide = library.up(x.shape[1], library.REGISTER)
    grad_x, grad_weight = weight.new_empty(len(x), wide), weight.new_empty(len(weight), wide)
    losses = _call(x, weight, target, z_loss_weight, grad_x, grad_weight)
    return *losses, grad_x[:, : x.shape[1]].contiguous(), grad_weight[:, : x.shape[1]].contiguous()


@head_loss_and_gradients.register_fake
def _like_gradients(
    x: Tensor, weight: Tensor, target: Tensor, z_loss_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return weight.new_empty(()), weight.new_empty(()), weight.new_empty(x.shape), weight.new_empty(weight.shape)


@register_flop_formula([torch.ops.moe_train.head_loss])
def _flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """For torch's counter, which does not look into operators."""
    return 2 * x[0] * x[1] * weight[0]


@register_flop_formula([torch.ops.moe_train.head_loss_and_gradients])
def _flops_of_all(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 3 * 2 * x[0] * x[1] * weight[0]
