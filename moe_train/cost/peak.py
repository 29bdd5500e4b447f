"""The matmul rate a device really reaches, for devices whose printed peak is unknown (a CPU above all).

Model FLOPs utilisation needs a peak to be a share of. Where there is no data sheet, the best rate of a large square
matmul on this machine, with the threads this run has, is the honest denominator.
"""

from __future__ import annotations

import time

import torch


def measured_matmul_tflops(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """Best rate in TFLOP/s over repeated N x N matmuls of random data, N = 1024 on a CPU and 8192 on a GPU.

    `dtype` is one torch.matmul takes (float32, bfloat16). Repeats for `seconds`, at least once. The data are random
    because zeros draw less power and so flatter the clock rate.
    """
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.matmul(a, b)  # the first call also loads and tunes the kernel
    best = float("inf")
    begin = time.perf_counter()
    while best == float("inf") or time.perf_counter() - begin < seconds:
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.matmul(a, b, out=product)
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12
