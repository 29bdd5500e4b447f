"""What torch reads from the environment once, settled before it is loaded. Whatever the user has set stays.

`GOMP_SPINCOUNT`: OpenMP threads spin while they wait for each other; with anything else on the cores, a step then takes
many times as long. `THP_MEM_ALLOC_ENABLE`: tensors of 2 MB and more begin at a page and may take huge ones. That saves
page faults, but above all it lets glibc use a freed tensor's place again (training/allocator.py says why).
"""

from __future__ import annotations

import os


def settle_environment() -> None:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
