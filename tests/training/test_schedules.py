"""The learning rate over a run's progress: where it starts, holds and ends, for every division into steps."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from moe_train.compose import validated
from moe_train.config import ScheduleConfig, SegmentsConfig, WarmupDecayConfig
from moe_train.errors import UserError
from moe_train.training.schedules import lr_factor

CONFIGS = Path(__file__).parents[2] / "configs"


@st.composite
def schedules(draw):
    kind = draw(st.sampled_from(["wsd", "cosine", "constant"]))
    warmup = draw(st.floats(0, 1))
    return WarmupDecayConfig(
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
    config = WarmupDecayConfig(kind="wsd", warmup_fraction=0.1, decay_fraction=0.4, final_lr_fraction=0.2)
    seen = [lr_factor(config, progress) for progress in (0.0, 0.05, 0.1, 0.35, 0.6, 0.8, 1.0)]
    assert seen == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0, 0.6, 0.2])


def test_cosine_falls_by_half_a_cosine_from_the_end_of_the_warm_up():
    config = WarmupDecayConfig(kind="cosine", warmup_fraction=0.2, decay_fraction=0.0, final_lr_fraction=0.1)
    seen = [lr_factor(config, progress) for progress in (0.2, 0.4, 0.6, 1.0)]
    assert seen == pytest.approx([1.0, 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 0.55, 0.1])


def test_constant_holds_the_peak_after_the_warm_up():
    config = WarmupDecayConfig(kind="constant", warmup_fraction=0.1, decay_fraction=0.0, final_lr_fraction=0.0)
    assert [lr_factor(config, progress) for progress in (0.05, 0.1, 0.5, 1.0)] == pytest.approx([0.5, 1, 1, 1])


def test_past_the_end_the_rate_stays_where_it_ended():
    config = WarmupDecayConfig(kind="cosine", warmup_fraction=0.0, decay_fraction=0.0, final_lr_fraction=0.1)
    assert lr_factor(config, 1.3) == pytest.approx(lr_factor(config, 1.0)) == pytest.approx(0.1)


def schedule(name):
    path = CONFIGS / f"schedule/{name}.yaml"
    return validated(ScheduleConfig, OmegaConf.to_container(OmegaConf.load(path)), str(path))


def test_the_schedule_of_deepseek_v3_has_its_published_rates():
    config = schedule("deepseek_v3")
    assert isinstance(config, SegmentsConfig)
    # Trillions of tokens of 14.8 (arXiv 2412.19437, section 4.2) and the rate there, halfway down the cosine included.
    published = {
        0.0126: 1.1e-4,
        5: 2.2e-4,
        10: 2.2e-4,
        12.15: 1.21e-4,
        14.3: 2.2e-5,
        14.6: 2.2e-5,
        14.7: 7.3e-6,
        14.8: 7.3e-6,
    }
    for trillions, rate in published.items():
        assert 2.2e-4 * lr_factor(config, trillions / 14.8) == pytest.approx(rate, rel=3e-3), trillions


def test_segments_that_do_not_end_one_after_the_other_are_refused():
    for ends in ((0.5, 0.5, 1.0), (0.7, 0.2, 1.0), (0.5, 0.9), ()):
        segments = [{"until": end, "shape": "linear", "to": 0.5} for end in ends]
        with pytest.raises(UserError, match="each must end after the one before"):
            validated(ScheduleConfig, {"kind": "segments", "warmup_fraction": 0.1, "segments": segments}, "schedule")


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONFIGS / "schedule").glob("*.yaml")))
def test_every_schedule_on_offer_gives_all_its_keys(name):
    assert schedule(name).kind == ("segments" if name == "deepseek_v3" else name)
