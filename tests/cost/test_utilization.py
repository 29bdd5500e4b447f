"""FLOPs by number format, and the utilisation that weighs them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moe_train.config import ModelConfig, PeakConfig
from moe_train.cost.flops import recomputed_flops_per_token, training_flops_per_token
from moe_train.cost.utilization import flops_by_format, ideal_seconds

ModelOf = Callable[..., ModelConfig]
H800 = PeakConfig(bfloat16=989.0, float8=1979.0, float32=67.0)


@pytest.mark.parametrize("linear", ["float32", "bfloat16", "float8"])
@pytest.mark.parametrize("name", ["deepseek_v3", "nano", "dense_nano"])
def test_flops_by_format_add_up_to_all(name: str, linear, model_config: ModelOf) -> None:
    model = model_config(name, "mtp=depth_1")
    found = flops_by_format(model, 4096, 4096, linear)
    assert sum(found.values()) == pytest.approx(training_flops_per_token(model, 4096, 4096), rel=1e-12)


def test_deepseek_v3_multiplies_86_percent_in_fp8_and_keeps_attention_and_head_wide(model_config: ModelOf) -> None:
    # By hand, GFLOPs a trained token at 4K: attention core 6 * 61 * 128 * (192 + 128) * 2048.5, head 6 * 7168 * 129280,
    # router 6 * 58 * 7168 * 256.
    found = flops_by_format(model_config("deepseek_v3"), 4096, 129280, "bfloat16", "float8")
    core, head, router = 6 * 61 * 128 * 320 * 2048.5, 6 * 7168 * 129280, 6 * 58 * 7168 * 256
    assert found["bfloat16"] == pytest.approx(core + head)
    assert found["float32"] == pytest.approx(router)
    assert found["float8"] / sum(found.values()) == pytest.approx(0.86, abs=0.02)


def test_ideal_time_is_each_formats_flops_over_its_own_peak() -> None:
    flops = {"bfloat16": 989e12, "float8": 2 * 1979e12}
    assert ideal_seconds(flops, H800) == pytest.approx(3.0)


def test_a_router_in_tf32_is_held_against_half_of_bf16s_peak(model_config: ModelOf) -> None:
    shape = (model_config("base"), 1024, 16_384)
    wide, tf32 = (flops_by_format(*shape, "bfloat16", router=router) for router in ("float32", "tensorfloat32"))
    assert tf32["tensorfloat32"] == wide["float32"] > 0
    faster = tf32["tensorfloat32"] / 1e12 * (1 / 67 - 2 / 989)
    assert ideal_seconds(wide, H800) - ideal_seconds(tf32, H800) == pytest.approx(faster)
    assert ideal_seconds(tf32, PeakConfig(bfloat16=None, float8=None, float32=67.0)) is None


def test_without_a_peak_for_one_of_the_formats_there_is_no_ideal_time() -> None:
    assert ideal_seconds({"float8": 1.0}, PeakConfig(bfloat16=312.0, float8=None, float32=19.5)) is None
    assert ideal_seconds({"bfloat16": 1.0}, PeakConfig(bfloat16=312.0, float8=None, float32=None)) is not None


def test_what_is_recomputed_is_the_forward_pass_without_the_heads(model_config: ModelOf) -> None:
    model = model_config("nano")
    head = 2 * model.hidden_size * 4096
    once = training_flops_per_token(model, 256, 4096) / 3 - head
    assert recomputed_flops_per_token(model, 256, 4096) == pytest.approx(once)
    with_mtp = model_config("nano", "mtp=depth_1")
    once = training_flops_per_token(with_mtp, 256, 4096) / 3 - head * (1 + 255 / 256)
    assert recomputed_flops_per_token(with_mtp, 256, 4096) == pytest.approx(once)
