"""Have the model take other kernels than a CPU's own choice: those in C, or Triton's, interpreted."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import pytest
import torch.nn.functional as F
from torch import Tensor

from moe_train.cost.kernels import Kernels
from moe_train.errors import UserError
from moe_train.kernels.cpu import library
from moe_train.model import attention, loss


@contextlib.contextmanager
def taken(kernels: Kernels, *, in_bf16: bool) -> Iterator[None]:
    """Within, a model on a CPU takes these, as far as they are for its products' format. Skips where there are none."""
    if kernels is Kernels.COMPILED and in_bf16:
        skip_without_c_kernels()
    with pytest.MonkeyPatch.context() as patch:
        if kernels is Kernels.TRITON:
            _take_triton(patch)
        library.use("compiled" if kernels is Kernels.COMPILED and in_bf16 else "torch", in_bf16)
        try:
            yield
        finally:
            library.use("torch", in_bf16)


def skip_without_c_kernels() -> None:
    """Sources that do not compile are a failure."""
    missing = library._missing(in_bf16=True)
    try:
        library._compiler()
    except UserError as error:
        missing = missing or str(error)
    if missing is not None:
        pytest.skip(missing)


def _take_triton(patch: pytest.MonkeyPatch) -> None:
    """What a GPU takes: the kernels, torch's fused attention, and large chunks of logits."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("kernels are compiled where there is a CUDA device")
    for name, module in list(sys.modules.items()):
        if name.startswith("moe_train.") and hasattr(module, "runs_triton"):
            patch.setattr(module, "runs_triton", lambda device: True)
    patch.setattr(attention, "causal_attention", _fused_attention)
    patch.setitem(loss.CHUNK_ELEMENTS, "cpu", loss.CHUNK_ELEMENTS["cuda"])


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, *, grouped: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
