"""Resident memory of a process on a CPU: what it had before a model was built, and what a step's tensors add.

The operating system counts pages, not tensors. glibc gives a large tensor pages of its own, which go back at once; with
its default settings it raises the size that counts as large (to 32 MB) and keeps the rest in a heap with holes. With
MALLOC_MMAP_THRESHOLD_=65536 and MALLOC_TRIM_THRESHOLD_=65536 in the environment the growth is that of the tensors; the
prediction was 19% below it without them (docs/log.md).
"""

from __future__ import annotations

import psutil

from moe_train.cost.memory import PeakMemory


def resident_bytes() -> int:
    """Resident memory of this process now, in bytes; read it before a model is built."""
    return int(psutil.Process().memory_info().rss)


def resident_peak(before: int, peak: PeakMemory) -> int:
    """The most resident bytes to expect of a training process that had `before` without a model.

    Measured in FP32 above 1 GB of tensors, with the settings above: within 1%. In BF16 oneDNN's kernels and their
    copies come on top, several hundred MB for hundreds of shapes, which no formula here knows.
    """
    return before + peak.bytes
