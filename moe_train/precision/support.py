"""Which number formats the hardware multiplies natively."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

_HAS_TRITON = importlib.util.find_spec("triton") is not None


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


def router_in_tf32(device: torch.device, compute: torch.dtype) -> bool:
    """Whether the router multiplies in TF32: beside narrower products, on a GPU that has it (NVIDIA's from 8.0)."""
    if device.type != "cuda" or compute.itemsize >= 4 or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def runs_triton(device: torch.device) -> bool:
    """Whether the project's Triton kernels run there: CUDA from compute capability 8.0, with Triton installed."""
    return _HAS_TRITON and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def runs_hopper_products(device: torch.device) -> bool:
    """Whether kernels/grouped_hopper.py can be asked what it takes: compute capability 9.0, with Triton installed."""
    return _HAS_TRITON and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def takes_torchs_grouped_matmul(x: Tensor) -> bool:
    """Whether torch's grouped matmul is fast for it: in BF16 on a GPU of 9.x or 10.x, and where Triton lacks.

    In FP32 and FP16 torch 2.11 goes round the groups there too, whose ends it copies to the host.
    """
    if x.device.type != "cuda":
        return x.device.type == "meta"
    capability = torch.cuda.get_device_capability(x.device)
    return (capability[0] in (9, 10) and x.dtype == torch.bfloat16) or capability < (8, 0) or not _HAS_TRITON
