"""Every corpus in configs/data composes into its dataclass, with every key written out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from moe_train.compose import validated
from moe_train.config import AnyDataConfig, DataConfig
from moe_train.data.corpora import documents
from moe_train.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
CORPORA = sorted(file.stem for file in (CONFIGS / "data").glob("*.yaml") if file.stem != "base")


def _composed(name: str) -> dict[str, Any]:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = OmegaConf.to_container(hydra.compose("data/" + name), resolve=True)
    assert isinstance(composed, dict)
    return composed["data"]  # type: ignore[no-any-return]


def _config(name: str) -> DataConfig:
    return validated(AnyDataConfig, _composed(name), "configs/data")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_composes_into_its_dataclass_with_every_key_written_out(name: str) -> None:
    config = _config(name)
    assert config.name == name
    assert set(_composed(name)) == {field.name for field in dataclasses.fields(config)}


def test_all_corpora_promised_are_there() -> None:
    assert CORPORA == ["fineweb_edu", "local_packages", "local_python", "text_files", "tinystories", "wikitext"]


def test_text_files_without_files_says_how_to_give_them() -> None:
    with pytest.raises(UserError, match=r"data\.files=\[GLOB,…\]"):
        documents(_config("text_files"))  # type: ignore[arg-type]
