"""Energy a device has drawn: from a counter that the hardware keeps, or from watts that the user states.

GPUs: the counter of the driver (NVML, Volta and newer). CPUs: RAPL, where Linux lets it be read. It counts whole
sockets, whatever runs on them. Where there is neither, energy is unknown and `note` says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch

from moe_train.errors import one_line

POWERCAP = Path("/sys/class/powercap")


class _Counter(Protocol):
    source: str

    def joules(self) -> float:
        """Since the counter was opened."""


class _Unreadable(Exception):
    """Why a counter cannot be read."""


class _Nvml:
    """`device_index` is torch's. NVML numbers devices regardless of CUDA_VISIBLE_DEVICES, so it is found by UUID."""

    source = "NVML counter"

    def __init__(self, device_index: int) -> None:
        try:
            import pynvml as nvml
        except ImportError:
            raise _Unreadable("install nvidia-ml-py, e.g. pip install -e '.[gpu]'") from None
        try:
            nvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device_index).uuid
            self._handle: Any = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._start_mj: int = nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except nvml.NVMLError as error:  # no NVIDIA driver, a MIG slice, a device older than Volta
            raise _Unreadable(one_line(error)) from None
        self._nvml: Any = nvml

    def joules(self) -> float:
        now_mj: int = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        return (now_mj - self._start_mj) / 1000


class _Rapl:
    """All sockets and their memory. The counters wrap around, after minutes at full load on some processors."""

    source = "RAPL counters of the machine's sockets and memory"

    def __init__(self, root: Path) -> None:
        self._zones: list[tuple[Path, int]] = []
        self._joules = 0.0
        try:
            for zone in sorted(root.glob("*-rapl:*")):
                name = (zone / "name").read_text().strip()
                if name.startswith("package") or name == "dram":
                    self._zones.append((zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())))
            self._last = [self._read(file) for file, _ in self._zones]
        except (OSError, ValueError) as error:
            raise _Unreadable(f"RAPL cannot be read ({one_line(error)})") from None
        if not self._zones:
            raise _Unreadable("this machine shows no RAPL counters")

    @staticmethod
    def _read(file: Path) -> int:
        return int(file.read_text())

    def joules(self) -> float:
        for index, (file, wraps_at) in enumerate(self._zones):
            now = self._read(file)
            self._joules += (now - self._last[index]) % (wraps_at + 1) / 1e6
            self._last[index] = now
        return self._joules


class _Stated:
    """`watts` for every second."""

    def __init__(self, watts: float, clock: Callable[[], float]) -> None:
        self.source = f"given: {watts:g} W a device"
        self._watts, self._clock, self._start = watts, clock, clock()

    def joules(self) -> float:
        return self._watts * (self._clock() - self._start)


class Reading(NamedTuple):
    """A counter and a run's two clocks at one moment."""

    joules: float
    wall_seconds: float
    train_seconds: float

    def drawn_in_training(self, later: Reading) -> float:
        """Joules until `later`, of its time the part that the train clock ran."""
        passed = later.wall_seconds - self.wall_seconds
        share = min(1.0, (later.train_seconds - self.train_seconds) / passed) if passed > 0 else 1.0
        return (later.joules - self.joules) * share


class EnergyMeter:
    """Joules drawn by this process's device since the meter was made.

    `watts`: what the user says a device draws, used where there is no counter. `first_on_machine`: whether this is the
    process that reads counters shared by a whole machine; the others add nothing to them. `source` says where the
    figure is from (None: there is none, and `note` says why).
    """

    def __init__(
        self,
        device_type: Literal["cpu", "cuda"],
        device_index: int,
        *,
        watts: float | None = None,
        first_on_machine: bool = True,
        powercap: Path = POWERCAP,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counter: _Counter | None = None
        self.note: str | None = None
        self._counts = first_on_machine or device_type == "cuda"
        try:
            self._counter = _Nvml(device_index) if device_type == "cuda" else _Rapl(powercap)
        except _Unreadable as error:
            self.note = f"energy is not measured: {error}"
            if watts is not None:
                self._counter, self._counts = _Stated(watts, clock), True

    @property
    def source(self) -> str | None:
        return None if self._counter is None else self._counter.source

    def joules(self) -> float | None:
        if self._counter is None:
            return None
        return self._counter.joules() if self._counts else 0.0
