"""Measured rates are positive and stop in time; energy is the driver's counter or absent with a reason."""

import sys
import types
from pathlib import Path

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


class Rapl:
    """The folders in which Linux shows the counters of two sockets, one with memory and cores of its own."""

    RANGE = 1_000_000

    def __init__(self, root: Path) -> None:
        self.root = root
        for zone, name in {
            "intel-rapl:0": "package-0",
            "intel-rapl:0:0": "core",  # within its package
            "intel-rapl:0:1": "dram",
            "intel-rapl:1": "package-1",
            "intel-rapl:2": "psys",  # the whole machine again
        }.items():
            (root / zone).mkdir()
            (root / zone / "name").write_text(f"{name}\n")
            (root / zone / "max_energy_range_uj").write_text(f"{self.RANGE}\n")
            self.set(zone, 900_000)

    def set(self, zone: str, microjoules: int) -> None:
        (self.root / zone / "energy_uj").write_text(f"{microjoules}\n")


def test_a_cpu_without_counters_has_no_energy_figure_and_says_so(tmp_path: Path) -> None:
    meter = EnergyMeter("cpu", 0, powercap=tmp_path)
    assert meter.joules() is meter.source is None
    assert "no RAPL counters" in str(meter.note)


def test_a_cpus_energy_is_that_of_its_sockets_and_memory_each_counted_once(tmp_path: Path) -> None:
    rapl = Rapl(tmp_path)
    meter = EnergyMeter("cpu", 0, powercap=tmp_path)
    for zone in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:0:1", "intel-rapl:1", "intel-rapl:2"):
        rapl.set(zone, 950_000)
    assert meter.joules() == pytest.approx(3 * 0.05)
    assert "RAPL" in str(meter.source)


def test_a_counter_that_wraps_around_goes_on_counting(tmp_path: Path) -> None:
    rapl = Rapl(tmp_path)
    meter = EnergyMeter("cpu", 0, powercap=tmp_path)
    for reading in (100_000, 50_000):  # 200,001 and then 950,001 further
        rapl.set("intel-rapl:1", reading)
        joules = meter.joules()
    assert joules == pytest.approx(1.150002)


def test_only_the_first_process_of_a_machine_counts_its_sockets(tmp_path: Path) -> None:
    rapl = Rapl(tmp_path)
    meter = EnergyMeter("cpu", 0, powercap=tmp_path, first_on_machine=False)
    rapl.set("intel-rapl:0", 990_000)
    assert meter.joules() == 0


def test_counters_that_may_not_be_read_are_said_to_be(tmp_path: Path) -> None:
    Rapl(tmp_path)
    (tmp_path / "intel-rapl:1/energy_uj").unlink()
    meter = EnergyMeter("cpu", 0, powercap=tmp_path)
    assert meter.joules() is None
    assert "RAPL cannot be read" in str(meter.note)


def test_stated_watts_stand_in_where_nothing_is_measured_and_only_there(tmp_path: Path) -> None:
    ticks = iter([100.0, 110.0])
    stated = EnergyMeter("cpu", 0, watts=65.0, powercap=tmp_path, first_on_machine=False, clock=lambda: next(ticks))
    assert (stated.joules(), stated.source) == (650.0, "given: 65 W a device")
    Rapl(tmp_path)
    assert "RAPL" in str(EnergyMeter("cpu", 0, watts=65.0, powercap=tmp_path).source)


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
