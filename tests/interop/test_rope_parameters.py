"""Rotary settings survive the way there and back; logits under them are compared in test_round_trip and test_export."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.config import Llama3RopeConfig, ModelConfig, RopeScalingConfig, YarnConfig
from moe_train.errors import UserError
from moe_train.interop.rope_parameters import to_settings, to_theirs

yarn = st.builds(
    YarnConfig,
    st.just("yarn"),
    factor=st.floats(1.5, 64),
    original_max_position_embeddings=st.integers(16, 8192),
    beta_fast=st.floats(8, 64),
    beta_slow=st.floats(0.5, 4),
    mscale=st.sampled_from([0.0, 0.707, 1.0, 1.3]),
)
llama3 = st.builds(
    Llama3RopeConfig,
    st.just("llama3"),
    factor=st.floats(1, 64),
    original_max_position_embeddings=st.integers(16, 8192),
    low_freq_factor=st.floats(0.5, 2),
    high_freq_factor=st.floats(3, 8),
)


@pytest.mark.parametrize("attention", ["mla_4x32", "gqa_4x32"])
def test_every_scaling_comes_back_as_it_was(attention: str, model_config: Callable[..., ModelConfig]) -> None:
    plain = model_config("nano", f"attention={attention}")

    @given(scaling=st.one_of(st.none(), yarn, llama3))
    def check(scaling: RopeScalingConfig | None) -> None:
        theirs = to_theirs(dataclasses.replace(plain, rope_scaling=scaling))
        back = to_settings(theirs, mla=attention.startswith("mla"), where="there")
        assert back == (None if scaling is None else dataclasses.asdict(scaling))

    check()


def test_temperatures_that_transformers_derives_are_derived_alike() -> None:
    theirs = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    alone = to_settings(theirs, mla=False, where="there")
    assert alone is not None
    assert alone["mscale"] == 1.0
    ratio = to_settings(theirs | {"mscale": 0.5, "mscale_all_dim": 0.5}, mla=False, where="there")
    assert ratio is not None
    assert ratio["mscale"] == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, "on the rotary features alone"),
        ({"truncate": False, "mscale": 1.0, "mscale_all_dim": 1.0}, "truncate=false"),
        ({"factor": None}, "are incomplete"),
    ],
)
def test_what_would_be_another_function_is_refused(changes: dict[str, object], message: str) -> None:
    theirs = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    with pytest.raises(UserError, match=message):
        to_settings(theirs | changes, mla=True, where="there")
