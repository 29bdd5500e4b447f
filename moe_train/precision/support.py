"""Which number formats the hardware multiplies natively."""

from __future__ import annotations

import functools
import importlib.util

import torch


def multiplies_bfloat16(device_type: str) -> bool:
    """Whether BF16 matrix products are faster than FP32 ones there: CUDA from compute capability 8.0, CPUs with units.

    On two cores with AVX512-BF16 they are 2 to 3 times as fast (0.39 against 0.18 TFLOP/s).
    """
    if device_type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    try:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    except AttributeError:  # torch's own probes are not public; without them stay on the safe side
        return False


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # else it traces into the driver's functions
def takes_torchs_grouped_matmul(device: torch.device) -> bool:
    """Whether torch's grouped matmul is the fast one there: on a GPU of 9.x or 10.x, and where Triton lacks."""
    # On meta tensors as well, where torch's FLOP counter knows it.
    return device.type == "meta" or (device.type == "cuda" and _is_fast(device))


@functools.cache
def _is_fast(device: torch.device) -> bool:
    capability = torch.cuda.get_device_capability(device)
    return capability[0] in (9, 10) or capability < (8, 0) or importlib.util.find_spec("triton") is None
