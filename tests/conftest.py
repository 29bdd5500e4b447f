"""Shared by all tests: offline, quiet, small; models and run configurations made from the ones in configs/."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores

import interpreter
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before any module of kernels
    interpreter.patch_once()

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from small_model import SMALL
from text import write_corpus

from moe_train.compose import CONFIGS, to_run_config, validated
from moe_train.config import ModelConfig, RunConfig
from moe_train.machine import cores_here
from moe_train.model.transformer import Transformer


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: a fifth of the suite's time is spent waiting for processes that wait."""
    return cores_here() + 1


@pytest.fixture(autouse=True)
def _one_thread_and_no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def compose_run() -> Callable[..., RunConfig]:
    """The RunConfig of `python train.py OVERRIDES…`, made in this process."""

    def run(*overrides: str) -> RunConfig:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed = compose(
                "train",
                overrides=["name=test", *overrides],
            )
        return to_run_config(composed)

    return run


@pytest.fixture(scope="session")
def model_config() -> Callable[..., ModelConfig]:
    """`model=NAME` with overrides of its keys (`moe=switch` is a group's choice, `moe=null` dense), resolved."""

    def make(name: str, *overrides: str) -> ModelConfig:
        with initialize_config_dir(str(CONFIGS / "model"), version_base="1.3"):
            composed = compose(name, overrides=[o for o in overrides if o != "moe=null"])
        plain = OmegaConf.to_container(composed)
        assert isinstance(plain, dict)
        return validated(ModelConfig, plain | ({"moe": None} if "moe=null" in overrides else {}), name).resolved()

    return make


@pytest.fixture
def small_model(model_config: Callable[..., ModelConfig]) -> Callable[..., Transformer]:
    """A three-layer MoE model of width 32 over 64 tokens, in float64 unless told otherwise, with seeded weights."""

    def make(*overrides: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Transformer:
        gqa = any(re.match("attention=[gm][qh]a", o) for o in overrides)
        short = [o.removeprefix("model.") for o in SMALL if not (gqa and "attention" in o)]
        model = Transformer(model_config("nano", *short, "initializer_range=0.2", *overrides), vocab_size=64)
        model.initialise(seed)
        return model.to(dtype)

    return make


@pytest.fixture(scope="session")
def text_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of made-up but regular text, 400 documents, big enough for both splits."""
    return write_corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """For a test that starts a runtime: what another one left would have its precision, and so would this one's."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
