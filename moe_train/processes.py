"""Which process is which: its number is given to another once it has ended.

The moment one began tells them apart, as the kernel counts it, since the boot: what a clock says of it moves when the
clock is set, and a whole sweep would be taken for gone.
"""

from __future__ import annotations

from pathlib import Path

import psutil

_STATE, _BEGAN = 0, 19  # of the fields behind the name in /proc/PID/stat, see proc_pid_stat(5)


def began(pid: int) -> str | None:
    """The boot and the moment in it; None where the process has ended, or is not there."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[_STATE] in ("Z", "X") else f"{_boot()}-{fields[_BEGAN]}"
    except (OSError, IndexError):
        return _by_the_clock(pid)


def is_alive(pid: int, moment: str | None) -> bool:
    """Whether the very process that began at that moment still runs."""
    return moment is not None and began(pid) == moment


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        return ""


def _by_the_clock(pid: int) -> str | None:
    """Where there is no /proc."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else repr(process.create_time())
    except (psutil.Error, ValueError, OverflowError):
        return None
