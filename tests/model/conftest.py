"""MoE settings of the named routers, at a size for loops over tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from moe_train.compose import CONFIGS, validated
from moe_train.config import MoEConfig

SIZES = {
    "num_experts": 8,
    "top_k": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 0,
}


@pytest.fixture(scope="session")
def moe() -> Callable[..., MoEConfig]:
    """The router `configs/model/moe/NAME.yaml` with 8 experts of width 8, two a token; then the changes."""

    def make(name: str = "loss_free", **changes: object) -> MoEConfig:
        with initialize_config_dir(str(CONFIGS / "model"), version_base="1.3"):
            preset = OmegaConf.to_container(compose(f"moe/{name}"))
        assert isinstance(preset, dict)
        return validated(MoEConfig, {**SIZES, **preset["moe"], **changes}, name)

    return make
