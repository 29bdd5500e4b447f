"""The recipes of `configs/precision/`, as a run has them."""

from __future__ import annotations

import yaml

from moe_train.compose import CONFIGS, validated
from moe_train.config import Fp8Config, PrecisionConfig


def precision(name: str, **changes: object) -> PrecisionConfig:
    content = yaml.safe_load((CONFIGS / f"precision/{name}.yaml").read_text())
    return validated(PrecisionConfig, content | changes, name)


def recipe(name: str) -> Fp8Config:
    found = precision(name).fp8
    assert found is not None
    return found
