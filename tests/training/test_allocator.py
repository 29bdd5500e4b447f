"""The allocator keeps what is freed where it is glibc's and nobody has set it up otherwise."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
from moe_train.before_torch import settle_environment
settle_environment()
import resource, torch
from moe_train.training.allocator import keep_freed_memory
done = keep_freed_memory()
for _ in range(2):
    torch.empty(2**25).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.empty(2**24).fill_(1)  # 64 MB, above any threshold of glibc's own
print(int(done), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> tuple[bool, int]:
    ran = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    done, count = ran.stdout.split()
    return done == "1", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_pages_are_asked_for_once_unless_the_environment_says_otherwise() -> None:
    left_alone, usual = faults(MALLOC_ARENA_MAX="4")
    assert not left_alone
    for _ in range(4):  # where a place lies differs from process to process
        done, kept = faults()
        assert done
        assert kept < usual / 16
