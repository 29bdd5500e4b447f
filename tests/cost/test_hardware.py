"""Devices are known by their driver's full name, carry their sources, and unknown ones stay unknown."""

import dataclasses
from datetime import date
from pathlib import Path

import pytest
import yaml

from moe_train.config import HardwareConfig, PeakConfig
from moe_train.cost.hardware import age_note, detect, load_hardware
from moe_train.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted((CONFIGS / "hardware").glob("*.yaml"))
AUTO = load_hardware(CONFIGS / "hardware" / "auto.yaml")

DRIVER_NAMES = {
    "NVIDIA A100-SXM4-40GB": "a100_40",
    "A100-SXM4-40GB": None,
    "NVIDIA A100-PCIE-40GB": "a100_40",
    "NVIDIA A100-SXM4-80GB": "a100_80",
    "NVIDIA A100-SXM-80GB": "a100_80",
    "NVIDIA A100 80GB PCIe": "a100_80",
    "NVIDIA A100-SXM4-80GB MIG 3g.40gb": None,
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    "NVIDIA H100 PCIe": "h100_pcie",
    "NVIDIA H100 PCIe MIG 1g.10gb": None,
    "NVIDIA H100 NVL": None,
    "NVIDIA H800": "h800",
    "NVIDIA H800 PCIe": None,
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": None,
    "NVIDIA H20": None,
    "NVIDIA GH200 480GB": None,
    "NVIDIA B200": "b200",
    "NVIDIA GB200": None,
    "AMD Instinct MI300X": "mi300x",
    "AMD Instinct MI300X VF": "mi300x",
    "AMD Instinct MI300A": None,
    "NVIDIA L40S": "l40s",
    "NVIDIA L40": None,
    "NVIDIA L4": "l4",
    "NVIDIA GeForce RTX 4090": "rtx_4090",
    "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 5090": "rtx_5090",
    "NVIDIA GeForce RTX 5090 D": None,
    "NVIDIA GeForce RTX 5090 Laptop GPU": None,
    "NVIDIA GeForce RTX 3090": "rtx_3090",
    "NVIDIA GeForce RTX 3090 Ti": None,
    "Tesla T4": "t4",
    "Tesla T40": None,
    "NVIDIA A10G": "a10g",
    "NVIDIA A10": None,
    "NVIDIA RTX A6000": "rtx_a6000",
    "NVIDIA RTX A6000-48Q": None,
    "NVIDIA RTX 6000 Ada Generation": "rtx_6000_ada",
    "NVIDIA RTX 5000 Ada Generation": None,
    "Quadro RTX 6000": None,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": None,
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_valid_complete_and_says_where_its_figures_are_from(path: Path) -> None:
    hardware = load_hardware(path)
    assert hardware.name == path.stem
    assert set(yaml.safe_load(path.read_text())) == {field.name for field in dataclasses.fields(HardwareConfig)}
    figures = (hardware.memory_gb, hardware.bandwidth_tb_s, hardware.tdp_w)
    no_specification = figures == (None, None, None) and hardware.peak_tflops == PeakConfig(None, None, None)
    for missing, source, day in [
        (no_specification, hardware.specification_source, hardware.specification_date),
        (hardware.price_usd_per_hour is None, hardware.price_source, hardware.price_date),
        (hardware.purchase_usd is None, hardware.purchase_source, hardware.purchase_date),
    ]:
        assert (source is None) == (day is None) == missing
    price, asked = hardware.price_usd_per_hour, hardware.price_range_usd_per_hour
    assert asked is None or (price is not None and asked[0] <= price <= asked[1])
    assert no_specification == (path.stem in {"auto", "cpu"})


def test_the_devices_meant_to_be_known_have_files() -> None:
    expected = {name for name in DRIVER_NAMES.values() if name} | {"auto", "cpu"}
    assert {path.stem for path in FILES} == expected


@pytest.mark.parametrize(("device_name", "expected"), DRIVER_NAMES.items())
def test_a_driver_name_finds_its_own_device_and_no_look_alike(device_name: str, expected: str | None) -> None:
    hardware, _ = detect(AUTO, CONFIGS, "cuda", device_name, {})
    assert hardware.name == (expected or device_name)


def test_a_known_device_comes_with_the_figures_of_its_file() -> None:
    hardware, notes = detect(AUTO, CONFIGS, "cuda", "NVIDIA H200", {})
    assert hardware == load_hardware(CONFIGS / "hardware" / "h200.yaml")
    assert notes == []


def test_dense_and_not_sparse_peaks_are_listed() -> None:
    peaks = {path.stem: load_hardware(path).peak_tflops for path in FILES}
    assert (peaks["h100"].bfloat16, peaks["h100"].float8) == (989, 1979)
    assert (peaks["a100_80"].bfloat16, peaks["rtx_4090"].bfloat16) == (312, 165)
    assert (peaks["h100_pcie"].bfloat16, peaks["rtx_a6000"].bfloat16, peaks["a10g"].bfloat16) == (756, 154.8, 70)
    assert peaks["t4"].bfloat16 is None


def test_an_unknown_device_has_no_figures() -> None:
    hardware, notes = detect(AUTO, CONFIGS, "cuda", "NVIDIA H100 NVL", {})
    assert hardware == dataclasses.replace(AUTO, name="NVIDIA H100 NVL")
    assert notes == []


@pytest.mark.parametrize("device_name", ["NVIDIA H200", "NVIDIA H100 NVL"])
def test_figures_the_user_sets_win_and_are_attributed_to_the_user(device_name: str) -> None:
    given = dataclasses.replace(AUTO, price_usd_per_hour=2.5, peak_tflops=PeakConfig(700.0, None, None))
    plain, _ = detect(AUTO, CONFIGS, "cuda", device_name, {})
    hardware, notes = detect(given, CONFIGS, "cuda", device_name, {})
    assert hardware.price_usd_per_hour == 2.5
    assert (hardware.price_source, hardware.price_date) == ("given in the configuration", None)
    assert hardware.peak_tflops == dataclasses.replace(plain.peak_tflops, bfloat16=700.0)
    assert hardware.specification_source == "given in the configuration"
    assert hardware.tdp_w == plain.tdp_w
    assert notes == []


def test_a_price_of_zero_is_a_price() -> None:
    hardware, notes = detect(dataclasses.replace(AUTO, price_usd_per_hour=0.0), CONFIGS, "cuda", "NVIDIA H200", {})
    assert hardware.price_usd_per_hour == 0
    assert notes == []


def test_a_source_the_user_gives_is_kept() -> None:
    given = dataclasses.replace(AUTO, price_usd_per_hour=2.5, price_source="our contract", price_date="2026-06")
    hardware, _ = detect(given, CONFIGS, "cuda", "NVIDIA H200", {})
    assert (hardware.price_source, hardware.price_date) == ("our contract", "2026-06")


def test_named_hardware_on_another_device_is_kept_and_noted() -> None:
    rtx_4090 = load_hardware(CONFIGS / "hardware" / "rtx_4090.yaml")
    for device_type, device_name in [("cuda", "NVIDIA L4"), ("cpu", "AMD EPYC")]:
        hardware, notes = detect(rtx_4090, CONFIGS, device_type, device_name, {})
        assert hardware == rtx_4090
        assert notes == [f"the prices of rtx_4090 are applied to {device_name}"]
    cpu = load_hardware(CONFIGS / "hardware" / "cpu.yaml")
    assert detect(cpu, CONFIGS, "cuda", "NVIDIA L4", {})[1] == ["the prices of cpu are applied to NVIDIA L4"]


def test_named_hardware_on_its_own_device_is_not_noted_and_an_overridden_price_is_the_users() -> None:
    rtx_4090 = load_hardware(CONFIGS / "hardware" / "rtx_4090.yaml")
    assert detect(rtx_4090, CONFIGS, "cuda", "NVIDIA GeForce RTX 4090", {}) == (rtx_4090, [])
    cheaper = dataclasses.replace(rtx_4090, price_usd_per_hour=0.1)
    hardware, _ = detect(cheaper, CONFIGS, "cuda", "NVIDIA GeForce RTX 4090", {})
    assert (hardware.price_source, hardware.price_date) == ("given in the configuration", None)


def test_hardware_of_the_users_own_needs_no_file() -> None:
    own = dataclasses.replace(AUTO, name="my_box", match=("My GPU [0-9]+",), price_usd_per_hour=1.0, price_source="me")
    assert detect(own, CONFIGS, "cuda", "My GPU 7", {}) == (own, [])


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("tdp_w: 700", "tdp_w: a lot", "tdp_w"),
        ("tdp_w: 700", "tdp_watts: 700", "tdp_w"),
        ("match: ['NVIDIA H100 80GB HBM3']", "match: [", "YAML"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_its_key(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = tmp_path / "h100.yaml"
    path.write_text((CONFIGS / "hardware" / "h100.yaml").read_text().replace(old, new))
    with pytest.raises(UserError, match=told) as caught:
        load_hardware(path)
    assert str(path) in str(caught.value)


def test_two_files_for_one_device_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "hardware"
    folder.mkdir()
    text = (CONFIGS / "hardware" / "l4.yaml").read_text()
    (folder / "l4.yaml").write_text(text)
    (folder / "mine.yaml").write_text(text.replace("name: l4", "name: mine"))
    with pytest.raises(UserError, match="hardware=l4"):
        detect(AUTO, tmp_path, "cuda", "NVIDIA L4", {})


def test_what_the_launcher_pays_wins_over_the_file_and_the_user_over_both() -> None:
    paid = {"MOE_TRAIN_PRICE_USD_PER_HOUR": "1.25"}
    for given, device, price, source in [
        (AUTO, "NVIDIA H200", 1.25, "given by MOE_TRAIN_PRICE_USD_PER_HOUR"),
        (AUTO, "Some GPU", 1.25, "given by MOE_TRAIN_PRICE_USD_PER_HOUR"),
        (load_hardware(CONFIGS / "hardware/h200.yaml"), "NVIDIA H200", 1.25, "given by MOE_TRAIN_PRICE_USD_PER_HOUR"),
        (dataclasses.replace(AUTO, price_usd_per_hour=2.0), "NVIDIA H200", 2.0, "given in the configuration"),
        (dataclasses.replace(AUTO, name="mine", price_usd_per_hour=3.0, price_source="me"), "Some GPU", 3.0, "me"),
    ]:
        hardware, _ = detect(given, CONFIGS, "cuda", device, paid)
        assert (hardware.price_usd_per_hour, hardware.price_source, hardware.price_range_usd_per_hour) == (
            price,
            source,
            None,
        )


@pytest.mark.parametrize("text", ["two", "-1", "nan", "inf"])
def test_a_price_of_the_launcher_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"MOE_TRAIN_PRICE_USD_PER_HOUR={text} is no price"):
        detect(AUTO, CONFIGS, "cuda", "NVIDIA H200", {"MOE_TRAIN_PRICE_USD_PER_HOUR": text})


@pytest.mark.parametrize(
    ("price_date", "source", "note"),
    [
        ("2026-03", "RunPod", None),
        ("2024-12", "a paper", "of 2024-12, more than a year old"),
        ("2025", "a list", None),  # it may be of its last day
        (None, "a list", "has no date"),
        (None, "given in the configuration", None),
        (None, None, None),
    ],
)
def test_a_price_older_than_a_year_is_said_to_be(price_date: str | None, source: str | None, note: str | None) -> None:
    said = age_note("l4", price_date, source, date(2026, 11, 25), "hardware.price_usd_per_hour")
    assert said is None if note is None else note in str(said)
