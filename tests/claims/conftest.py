"""A claim of a user's own on tiny models, and suites that are asked about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_up_claims import SETTINGS, TWO_ARMS

from moe_train.claims import plan
from moe_train.claims.library import load_claims
from moe_train.claims.plan import Plan, make_plan
from moe_train.claims.suite import Asked
from moe_train.compose import compose_run
from moe_train.config import RunConfig

_COMPOSED: dict[tuple[str, ...], RunConfig] = {}


@pytest.fixture(autouse=True)
def _each_arm_is_composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """hydra takes most of a second, and these tests ask for the same few arms again and again."""

    def composed(overrides: list[str], name: str, config_dir: Path | None) -> RunConfig:
        key = tuple(overrides)
        if key not in _COMPOSED:
            _COMPOSED[key] = compose_run(overrides, "claim")
        return _COMPOSED[key]

    monkeypatch.setattr(plan, "compose_run", composed)


@pytest.fixture
def claim_dir(tmp_path: Path, text_corpus: Path) -> Callable[..., Path]:
    """A --config-dir whose DIR/claim/NAME.yaml is the claim of two arms, with changes."""

    def write(name: str = "mine", **changes: Any) -> Path:
        folder = tmp_path / "own"
        (folder / "claim").mkdir(parents=True, exist_ok=True)
        content = TWO_ARMS | {"base": [*SETTINGS, f"data.files=[{text_corpus}/*.jsonl]"]} | changes
        (folder / "claim" / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return folder

    return write


@pytest.fixture
def plan_of(claim_dir: Callable[..., Path]) -> Callable[..., Plan]:
    def make(**changes: Any) -> Plan:
        folder = claim_dir(**changes)
        (claim,) = load_claims("mine", "smoke", folder)
        return make_plan(claim, "smoke", ["tracking=none"], folder)

    return make


@pytest.fixture
def asked(tmp_path: Path, claim_dir: Callable[..., Path]) -> Callable[..., Asked]:
    def make(claims: str = "mine", **changes: Any) -> Asked:
        settings: dict[str, Any] = {"given": ("tracking=none",), "config_dir": tmp_path / "own"} | changes
        return Asked(claims, "cpu", tmp_path / "out", **settings)

    return make
