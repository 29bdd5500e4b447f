"""The $5.576M: to the dollar, and what follows from it as the reports and a calculator say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_train.compose import CONFIGS
from moe_train.config import ModelConfig
from moe_train.cost.hardware import load_hardware
from moe_train.forecast.deepseek_v3 import recompute
from moe_train.forecast.plot import plot_deepseek_v3
from moe_train.forecast.published import published_runs


@pytest.fixture(scope="module")
def table(model_config: Callable[..., ModelConfig]) -> dict[str, Any]:
    h800, h100 = (load_hardware(CONFIGS / f"hardware/{name}.yaml") for name in ("h800", "h100"))
    return recompute(model_config("deepseek_v3"), 129280, h800, h100, published_runs())


def test_the_table_of_the_report_to_the_dollar(table: dict[str, Any]) -> None:
    assert [phase["usd"] for phase in table["phases"]] == [5_328_000, 238_000, 10_000]
    assert (table["gpu_hours"], table["usd"]) == (2_788_000, 5_576_000)


def test_the_implied_speed_is_the_one_derived_from_the_report(table: dict[str, Any]) -> None:
    assert table["tokens_per_second_per_gpu"] == pytest.approx(1543, abs=0.5)
    assert table["tflops_per_gpu"] == pytest.approx(386, abs=1)
    assert round(table["share_of_bf16_peak"], 2) == 0.39
    assert round(table["share_of_fp8_peak"], 2) == 0.20
    assert table["share_of_fp8_peak"] < table["mixed_precision_utilization"] < table["share_of_bf16_peak"]


def test_at_its_own_price_and_speed_the_sensitivity_gives_its_own_cost(table: dict[str, Any]) -> None:
    cells = {(cell["price_usd_per_hour"], cell["utilization"]): cell["usd"] for cell in table["sensitivity"]}
    assert cells[2.0, 0.39] == pytest.approx(5_328_000 * table["share_of_bf16_peak"] / 0.39)
    assert cells[5.0, 0.20] == pytest.approx(2.5 * cells[2.0, 0.20])
    assert cells[1.0, 0.20] == pytest.approx(2.5 * cells[1.0, 0.50])


def test_the_prediction_from_other_runs_holds_the_truth(table: dict[str, Any]) -> None:
    low, high = table["predicted_interval"]
    assert low < 2_664_000 < high


def test_the_dense_model_it_was_compared_with_took_eleven_times_the_hours(table: dict[str, Any]) -> None:
    assert table["peer_ratio"] == pytest.approx(30_840_000 / 2_664_000)


def test_the_picture_is_drawn_the_same_every_time(table: dict[str, Any], tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        plot_deepseek_v3(table, tmp_path / name)
    one, two = ((tmp_path / name).read_text() for name in ("one.svg", "two.svg"))
    assert one == two
    assert "DeepSeek-V3" in one or "<path" in one
