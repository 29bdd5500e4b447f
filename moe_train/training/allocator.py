"""glibc's allocator, told to keep what a step frees for the next step.

By default it asks the system for every large tensor and gives it back when freed, and the system hands out zeroed
pages, each with a fault: 100,000 of them a step of `tiny` (16 × 256, FP32), which take 14% of its time on one core.
Kept, memory at the peak is the same (1.44 GB resident either way).

A place is only used again with before_torch.py's page alignment. torch asks for 64 bytes' alignment, for which glibc
2.36 cuts slivers off both ends of a chunk; those of up to 1,032 bytes go to small allocations by way of the thread's
cache, and what is left is too small for the next tensor of the same size. In 17 of 24 processes it was not used again.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)
_AS_LARGE_AS_CAN_BE = 2**31 - 1


def keep_freed_memory() -> bool:
    """Whether it was done: not where another allocator serves the process, nor where the environment sets one up."""
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if hasattr(os, "confstr") else None
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _AS_LARGE_AS_CAN_BE))
