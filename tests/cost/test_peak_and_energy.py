"""Measured rates are positive and stop in time; energy is the driver's counter or absent with a reason."""

import sys
import types

import pytest
import torch

from moe_train.cost.energy import EnergyMeter
from moe_train.cost.peak import measured_matmul_tflops


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A driver with one device, known by its UUID, whose counter stands at 5000 mJ."""
    driver = types.SimpleNamespace(NVMLError=NVMLError, counter_mj=5000, nvmlInit=lambda: None)

    def handle(uuid: str) -> str:
        if uuid != "GPU-1234":
            raise NVMLError("Not Found")
        return "handle"

    driver.nvmlDeviceGetHandleByUUID = handle
    driver.nvmlDeviceGetTotalEnergyConsumption = lambda handle: driver.counter_mj
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid=["1234", "5678"][index])
    )
    return driver


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matmul_rate_is_that_of_a_plausible_machine(dtype: torch.dtype) -> None:
    rate = measured_matmul_tflops(torch.device("cpu"), dtype, seconds=0.05)
    assert 1e-4 < rate < 1e3


def test_a_matmul_rate_is_operations_over_the_fastest_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    # begin; the loop's checks and each repetition's start and end: 2 s, then 1 s, then 4 s
    ticks = iter([0.0, 0.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 7.0, 7.0])
    monkeypatch.setattr("moe_train.cost.peak.time.perf_counter", lambda: next(ticks))
    rate = measured_matmul_tflops(torch.device("cpu"), torch.float32, seconds=5.0)
    assert rate == pytest.approx(2 * 1024**3 / 1.0 / 1e12)


def test_a_cpu_has_no_energy_figure_and_says_so() -> None:
    meter = EnergyMeter("cpu", 0)
    assert meter.joules() is None
    assert "CPU" in str(meter.note)


def test_energy_is_the_counter_since_the_start_in_joules(nvml: types.SimpleNamespace) -> None:
    meter = EnergyMeter("cuda", 0)
    nvml.counter_mj = 12500
    assert meter.joules() == 7.5
    assert meter.note is None


def test_a_device_the_driver_cannot_measure_has_no_energy_figure(nvml: types.SimpleNamespace) -> None:
    meter = EnergyMeter("cuda", 1)
    assert meter.joules() is None
    assert "Not Found" in str(meter.note)


def test_without_the_library_the_note_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = EnergyMeter("cuda", 0)
    assert meter.joules() is None
    assert "nvidia-ml-py" in str(meter.note)
