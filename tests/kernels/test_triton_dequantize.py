"""FP8 with its scales back to wider numbers, bit for bit as torch's operations have it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernel_checks import same

from moe_train.kernels import reference
from moe_train.kernels.dequantize import dequantize
from moe_train.kernels.layouts import DTYPES, Rows


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_numbers_are_those_of_the_reference(
    format: str, dtype: torch.dtype, device: torch.device, random: Callable[..., Tensor]
) -> None:
    """Every byte with scales of all magnitudes; sizes that are no whole blocks, and none."""
    for n, k in ((45, 300), (64, 128), (0, 16)):
        byte = torch.arange(n * k, device=device).remainder(256).to(torch.uint8).view(n, k)
        scales = random(n, -(-k // 128)).abs() * torch.logspace(-38, 30, max(n, 1), device=device)[:n, None]
        rows = Rows(byte.view(DTYPES[format]), scales)
        assert same(dequantize(rows, dtype), reference.dequantize(rows, dtype))
