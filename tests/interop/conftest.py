"""Tiny models as folders: transformers' own, saved by transformers alone, and ours as run folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import CASES, VOCAB, randomise, their_config
from torch import nn

from moe_train.config import ModelConfig
from moe_train.data.tokenizer import bytes_tokenizer
from moe_train.model.transformer import Transformer
from moe_train.training.starting_point import starting_config, write_starting_point

transformers.utils.logging.disable_progress_bar()

Theirs = Callable[..., tuple[Path, nn.Module]]
AsRun = Callable[..., Path]


@pytest.fixture
def theirs(tmp_path: Path) -> Theirs:
    """A model of transformers' own and the folder it saved itself to, with a tokenizer of bytes."""

    def make(
        case: str,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        save: dict[str, Any] | None = None,
        **changes: Any,
    ) -> tuple[Path, nn.Module]:
        family, _ = CASES[case]
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForCausalLM")(their_config(case, **changes)).eval()
        randomise(model)
        folder = tmp_path / f"theirs_{case}"
        model.to(dtype).save_pretrained(folder, **(save or {}))
        bytes_tokenizer().save(folder)
        return folder, model

    return make


@pytest.fixture
def as_run(tmp_path: Path, small_model: Callable[..., Transformer]) -> AsRun:
    """A run folder of our small model, with random norms, and selection biases unless biased=False."""

    def make(*overrides: str, biased: bool = True, name: str = "ours", **changes: Any) -> Path:
        built: ModelConfig = small_model(*overrides).config
        config = dataclasses.replace(built, vocab_size=VOCAB, name=name, **changes)
        model = Transformer(config, VOCAB)
        model.initialise(0)
        torch.manual_seed(0)
        randomise(model)
        if not biased:
            for router in model.routers():
                router.selection_bias.zero_()
        out = tmp_path / name
        run = starting_config(config, out / "tokenizer", sequence_length=64)
        write_starting_point(out, run, model.state_dict(), bytes_tokenizer(), "made for a test")
        return out

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(7))
