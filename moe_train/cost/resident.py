"""Resident memory of a process on a CPU: what it had before a model was built, and what a step's tensors add.

The operating system counts pages, not tensors. Large tensors are pages of their own that go back at once; small ones
share a heap that glibc keeps, so growth is that of the tensors only where these are large (docs/log.md has figures).
"""

from __future__ import annotations

import psutil

from moe_train.cost.memory import PeakMemory


def resident_bytes() -> int:
    """Resident memory of this process now, in bytes; read it before a model is built."""
    return int(psutil.Process().memory_info().rss)


def resident_peak(before: int, peak: PeakMemory) -> int:
    """The most resident bytes to expect of a training process that had `before` without a model.

    Within 10% where tensors dominate (measured above 1 GB on one CPU). What libraries allocate once, oneDNN's kernels
    above all, is left out: warm them up before reading `before`, or expect some tens of MB more.
    """
    return before + peak.bytes
