"""Forecasts follow from their parts, scale as they should, and refuse or note what they cannot know."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.compose import CONFIGS
from moe_train.config import AdamWConfig, HardwareConfig, ModelConfig
from moe_train.cost.hardware import load_hardware
from moe_train.cost.layout import Layout
from moe_train.errors import UserError
from moe_train.forecast.published import published_runs
from moe_train.forecast.training_run import Plan, forecast, layouts_to_try
from moe_train.forecast.utilization_model import fitted

ADAMW = AdamWConfig("adamw", 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0)
MODEL = fitted(published_runs())
ModelOf = Callable[..., ModelConfig]


def device(file: str, **changes: Any) -> HardwareConfig:
    return dataclasses.replace(load_hardware(CONFIGS / f"hardware/{file}.yaml"), **changes)


@pytest.fixture(scope="module")
def plan(model_config: ModelOf) -> Plan:
    return Plan(
        model=model_config("olmoe_1b_7b"),
        vocab_size=50304,
        optimizer=ADAMW,
        tokens=10**12,
        sequence_length=4096,
        hardware=device("h100", price_usd_per_hour=2.0, price_range_usd_per_hour=(1.0, 3.0)),
        num_devices=64,
        precision="bf16",
        layouts=layouts_to_try(model_config("olmoe_1b_7b"), 64),
        micro_batch=1,
        activation_checkpointing=None,
    )


def test_every_figure_follows_from_the_share_of_the_peak(plan: Plan) -> None:
    found = forecast(plan, MODEL)
    for side, other in (("value", "value"), ("low", "high"), ("high", "low")):
        share = found["utilization_of_bf16_peak"][side]
        per_second = share * 989e12 / (6 * found["active_params"]) * 64
        assert found["tokens_per_second"][side] == pytest.approx(per_second)
        hours = 1e12 / per_second * 64 / 3600
        assert found["gpu_hours"][other] == pytest.approx(hours)
        assert found["days"][other] == pytest.approx(hours / 64 / 24)
        assert found["usd"][other] == pytest.approx(2 * hours)
    assert found["usd_at_market_prices"]["low"] == pytest.approx(found["gpu_hours"]["low"] * 1.0)
    assert found["usd_at_market_prices"]["high"] == pytest.approx(found["gpu_hours"]["high"] * 3.0)
    assert found["energy_kwh"]["high"] == pytest.approx(found["gpu_hours"]["high"] * 0.7)
    for key, figure in found.items():
        if isinstance(figure, dict) and "low" in figure:
            assert figure["low"] <= figure["value"] <= figure["high"], key


def test_olmoe_is_forecast_within_half_again_of_what_it_took(plan: Plan) -> None:
    # arXiv 2409.02060: 23,600 tokens/s and GPU. It is among the runs the model was fitted on.
    assert forecast(plan, MODEL)["tokens_per_second"]["value"] / 64 == pytest.approx(23_600, rel=0.5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 10**6), st.sampled_from([1, 2, 8, 64]))
def test_hours_grow_with_tokens_and_do_not_depend_on_devices(plan: Plan, millions: int, devices: int) -> None:
    layouts = layouts_to_try(plan.model, devices)
    found = forecast(dataclasses.replace(plan, tokens=millions * 10**6, num_devices=devices, layouts=layouts), MODEL)
    assert found["gpu_hours"]["value"] == pytest.approx(forecast(plan, MODEL)["gpu_hours"]["value"] * millions / 10**6)


def test_longer_sequences_take_as_much_longer_as_they_have_more_flops(plan: Plan) -> None:
    short, long = (forecast(dataclasses.replace(plan, sequence_length=n), MODEL) for n in (4096, 65536))
    assert long["flops_per_token"] > 2 * short["flops_per_token"]
    ratio = long["flops_per_token"] / short["flops_per_token"]
    assert long["gpu_hours"]["value"] == pytest.approx(ratio * short["gpu_hours"]["value"])
    assert long["model_flops_utilization"] == pytest.approx(short["model_flops_utilization"])


def test_a_price_outside_its_range_and_an_old_one_are_not_passed_over(plan: Plan) -> None:
    odd = device("h100", price_usd_per_hour=9.0, price_range_usd_per_hour=(1.0, 3.0), price_date="2020")
    found = forecast(dataclasses.replace(plan, hardware=odd), MODEL)
    market = found["usd_at_market_prices"]
    assert market["low"] <= market["value"] <= market["high"]
    assert any("of 2020, more than a year old" in note for note in found["notes"])


def test_the_simplest_layout_that_fits_is_taken_and_recomputation_only_where_needed(plan: Plan) -> None:
    memory = forecast(plan, MODEL)["memory"]
    assert (memory["layout"]["name"], memory["fits"]) == ("fsdp2", True)  # 7B parameters at 16 bytes: not on one device
    assert memory["peak_bytes"] == sum(memory["parts"].values()) <= memory["usable_bytes"]
    small = device("t4", peak_tflops=plan.hardware.peak_tflops)
    tight = dataclasses.replace(plan, hardware=small, micro_batch=2)
    assert forecast(tight, MODEL)["memory"]["activation_checkpointing"] is True


def test_what_fits_nowhere_is_said_to_with_what_could_help(plan: Plan) -> None:
    alone = dataclasses.replace(plan, num_devices=1, layouts=[Layout.named("single")])
    found = forecast(alone, MODEL)
    assert found["memory"]["fits"] is False
    assert any("does not fit: raise num_gpus" in note for note in found["notes"])


def test_a_model_smaller_than_any_published_run_is_noted(plan: Plan, model_config: ModelOf) -> None:
    tiny = dataclasses.replace(plan, model=model_config("tiny"), vocab_size=4096)
    assert any("outside the published runs" in note and "probe=true" in note for note in forecast(tiny, MODEL)["notes"])


def test_unknown_prices_and_powers_leave_their_figures_absent(plan: Plan) -> None:
    unknown = dataclasses.replace(plan, hardware=device("h100", price_usd_per_hour=None, tdp_w=None, memory_gb=None))
    found = forecast(unknown, MODEL)
    assert found["usd"] is found["usd_at_market_prices"] is found["energy_kwh"] is found["memory"]["fits"] is None


def test_formats_a_device_does_not_have_are_refused(plan: Plan) -> None:
    with pytest.raises(UserError, match="multiplies no FP8: choose precision=bf16"):
        forecast(dataclasses.replace(plan, precision="fp8", hardware=device("a100_80")), MODEL)
    with pytest.raises(UserError, match="no BF16 peak"):
        forecast(dataclasses.replace(plan, hardware=device("t4")), MODEL)
