"""Energy a GPU has drawn, from the counter its driver keeps (NVML, Volta and newer); None where there is none."""

from __future__ import annotations

from typing import Any, Literal

import torch


class EnergyMeter:
    """Joules drawn by one device since this object was made; `note` says why there are none.

    `device_index` is torch's. NVML numbers devices regardless of CUDA_VISIBLE_DEVICES, so the device is found by UUID.
    """

    def __init__(self, device_type: Literal["cpu", "cuda"], device_index: int) -> None:
        self.note: str | None = None
        self._nvml: Any = None
        if device_type == "cpu":
            self.note = "energy is not measured on a CPU"
            return
        try:
            import pynvml as nvml
        except ImportError:
            self.note = "energy is not measured: install nvidia-ml-py, e.g. pip install -e '.[gpu]'"
            return
        try:
            nvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device_index).uuid
            self._handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._start_mj = nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except nvml.NVMLError as error:  # no NVIDIA driver, a MIG slice, a device older than Volta
            self.note = f"energy is not measured: {error}"
            return
        self._nvml = nvml

    def joules(self) -> float | None:
        if self._nvml is None:
            return None
        now_mj: int = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        return float(now_mj - self._start_mj) / 1000
