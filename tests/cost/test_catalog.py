"""Prices from a catalogue in the real library's own format, kept in a folder in place of the network."""

from __future__ import annotations

import sys
import zipfile
from datetime import date
from pathlib import Path

import pytest
from gpuhunt import AcceleratorVendor, CatalogItem
from gpuhunt._internal.catalog import OFFLINE_PROVIDERS
from gpuhunt._internal.storage import dump

from moe_train.compose import CONFIGS
from moe_train.cost.catalog import known, quotes, write_hardware_file
from moe_train.cost.hardware import load_hardware
from moe_train.errors import UserError


def offer(gpu: str, memory: float, price: float, count: int = 1, spot: bool = False) -> CatalogItem:
    return CatalogItem(
        "", f"{gpu}x{count}", "here", price, 8, 64.0, count, gpu, memory, spot, None, AcceleratorVendor.NVIDIA
    )


OFFERS = {
    "runpod": [offer("H100", 80, 2.5), offer("H100", 80, 16.0, count=8), offer("H100", 80, 0.5, spot=True)],
    "lambdalabs": [offer("H100", 80, 3.0), offer("A100", 40, 1.3), offer("H100NVL", 94, 1.0)],
    "aws": [offer("H100", 80, 55.0, count=8), offer("A100", 80, 4.0)],
}


@pytest.fixture
def catalogues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for provider in OFFLINE_PROVIDERS:
        folder = tmp_path / provider / "1"
        folder.mkdir(parents=True)
        (folder.parent / "version").write_text("1")
        dump(OFFERS.get(provider, []), str(folder / "offers.csv"))
        with zipfile.ZipFile(folder / "catalog.zip", "w") as archive:
            archive.write(folder / "offers.csv", f"{provider}.csv")
    monkeypatch.setenv("GPUHUNT_CATALOG_URL", tmp_path.as_uri())


def test_a_price_is_the_median_of_each_providers_cheapest_on_demand_offer_a_gpu(catalogues: None) -> None:
    h100, a100 = quotes(["h100", "a100_40"])
    assert h100.by_provider == {"runpod": 2.0, "lambdalabs": 3.0, "aws": 55 / 8}
    assert (h100.usd_per_hour, h100.low, h100.high) == (3.0, 2.0, 6.875)
    assert (a100.usd_per_hour, a100.by_provider) == (1.3, {"lambdalabs": 1.3})


def test_it_becomes_a_hardware_file_with_source_and_date_and_overwrites_nothing(
    catalogues: None, tmp_path: Path
) -> None:
    (quote,) = quotes(["h100"])
    path = write_hardware_file(quote, tmp_path / "mine", date(2026, 11, 25))
    written, built_in = load_hardware(path), load_hardware(CONFIGS / "hardware/h100.yaml")
    assert (written.price_usd_per_hour, written.price_range_usd_per_hour) == (3.0, (2.0, 6.875))
    assert (written.price_date, written.name) == ("2026-11-25", "h100_2026_11_25")
    assert (written.match, written.peak_tflops, written.purchase_usd) == (
        built_in.match,
        built_in.peak_tflops,
        built_in.purchase_usd,
    )
    with pytest.raises(UserError, match="exists already"):
        write_hardware_file(quote, tmp_path / "mine", date(2026, 11, 25))


def test_every_name_it_knows_is_a_hardware_file() -> None:
    assert all((CONFIGS / f"hardware/{name}.yaml").is_file() for name in known())


def test_what_cannot_be_quoted_is_said(catalogues: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no provider offers l4"):
        quotes(["l4"])
    with pytest.raises(UserError, match="hardware=cpu is in no catalogue"):
        quotes(["cpu"])
    monkeypatch.setenv("GPUHUNT_CATALOG_URL", "file:///nowhere")
    with pytest.raises(UserError, match="cannot be fetched"):
        quotes(["h100"])
    monkeypatch.setitem(sys.modules, "gpuhunt", None)
    with pytest.raises(UserError, match="pip install"):
        quotes(["h100"])
