"""The learning rate over a run's progress: where it starts, holds and ends, for every division into steps."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from moe_train.compose import validated
from moe_train.config import ScheduleConfig
from moe_train.training.schedules import lr_factor

CONFIGS = Path(__file__).parents[2] / "configs"


@st.composite
def schedules(draw):
    kind = draw(st.sampled_from(["wsd", "cosine", "constant"]))
    warmup = draw(st.floats(0, 1))
    return ScheduleConfig(
        kind=kind,
        warmup_fraction=warmup,
        decay_fraction=draw(st.floats(0, 1).map(lambda part: part * (1 - warmup) * 0.999)),
        final_lr_fraction=draw(st.floats(0, 1)),
    )


@settings(deadline=None)
@given(schedules(), st.integers(1, 400))
def test_a_run_of_any_number_of_steps_has_factors_in_range_that_rise_then_fall_and_are_never_zero(config, steps):
    factors = [lr_factor(config, step / steps, 1 / steps) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert all(later <= earlier + 1e-12 for earlier, later in zip(factors[peak:], factors[peak + 1 :]))


def test_wsd_warms_up_holds_and_falls_linearly():
    config = ScheduleConfig(kind="wsd", warmup_fraction=0.1, decay_fraction=0.4, final_lr_fraction=0.2)
    seen = [lr_factor(config, progress) for progress in (0.0, 0.05, 0.1, 0.35, 0.6, 0.8, 1.0)]
    assert seen == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0, 0.6, 0.2])


def test_cosine_falls_by_half_a_cosine_from_the_end_of_the_warm_up():
    config = ScheduleConfig(kind="cosine", warmup_fraction=0.2, decay_fraction=0.0, final_lr_fraction=0.1)
    seen = [lr_factor(config, progress) for progress in (0.2, 0.4, 0.6, 1.0)]
    assert seen == pytest.approx([1.0, 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 0.55, 0.1])


def test_constant_holds_the_peak_after_the_warm_up():
    config = ScheduleConfig(kind="constant", warmup_fraction=0.1, decay_fraction=0.0, final_lr_fraction=0.0)
    assert [lr_factor(config, progress) for progress in (0.05, 0.1, 0.5, 1.0)] == pytest.approx([0.5, 1, 1, 1])


def test_past_the_end_the_rate_stays_where_it_ended():
    config = ScheduleConfig(kind="cosine", warmup_fraction=0.0, decay_fraction=0.0, final_lr_fraction=0.1)
    assert lr_factor(config, 1.3) == pytest.approx(lr_factor(config, 1.0)) == pytest.approx(0.1)


@pytest.mark.parametrize("path", sorted((CONFIGS / "schedule").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_schedule_on_offer_gives_all_its_keys(path):
    config = validated(ScheduleConfig, OmegaConf.to_container(OmegaConf.load(path)), str(path))
    assert config.kind == path.stem
