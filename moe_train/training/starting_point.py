"""A run folder at step 0: weights that were not trained here, in the form that everything else here reads.

`scripts/generate.py` and the export work on it as on any run, and a new run starts from it: its `configs/` hold a model
and an experiment for hydra's search path, so that `train.py --config-dir OUT/configs experiment=NAME` is all it takes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file
from torch import Tensor

from moe_train.compose import CONFIGS, to_run_config
from moe_train.config import ModelConfig, RunConfig, model_digest, to_dict
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import UserError
from moe_train.training.checkpoints import OPTIMIZERS, STATE, WEIGHTS
from moe_train.training.new_folder import new_folder
from moe_train.training.run_folder import CONFIG


def check_name(name: str) -> None:
    """Refuse a name that cannot be one of a file in configs/, or is one already."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError(f"name={name} is to name files of configs/: use letters, digits, _ and - only")
    for group in ("model", "experiment"):
        if (CONFIGS / group / f"{name}.yaml").exists():
            raise UserError(f"name={name} is taken by {group}={name} of configs/: give another name=")


def starting_config(model: ModelConfig, tokenizer: Path, sequence_length: int) -> RunConfig:
    """The run of `python train.py` with this model, its tokenizer and the length its positions were made for."""
    usual = _usual_config()
    data = dataclasses.replace(usual.data, tokenizer=str(tokenizer), sequence_length=sequence_length)
    return dataclasses.replace(usual, name=model.name, model=model, data=data)


@functools.cache
def _usual_config() -> RunConfig:
    """The run of `python train.py`; composing it takes a fifth of a second."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return to_run_config(compose("train", overrides=["name=usual"]))


def write_starting_point(
    out: Path, config: RunConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer | None, origin: str
) -> str:
    """Write `out` (new or empty) and return the command that trains from it. Raises UserError.

    weights: the state of the resolved model's Transformer, complete, contiguous, in any floating-point dtype, which is
    kept. tokenizer: None leaves weights that can be exported and trained on, but no text can be made with them. origin:
    where they are from, in a line; it goes into the checkpoint's state and into model cards.
    """
    name = config.model.name
    check_name(name)
    out = out.absolute()
    with new_folder(out) as folder:
        content = {**to_dict(config), "config_hash": config.config_hash()}
        (folder / CONFIG).write_text(yaml.safe_dump(content, sort_keys=False))
        if tokenizer is not None:
            (folder / "tokenizer").mkdir()
            tokenizer.save(folder / "tokenizer")

        checkpoint = folder / "checkpoints" / "step_0"
        checkpoint.mkdir(parents=True)
        save_file(dict(weights), checkpoint / WEIGHTS)  # written from where they are: no copy is made
        torch.save([], checkpoint / OPTIMIZERS)
        state = {
            "step": 0,
            "meter": {"tokens": 0, "flops": 0.0, "train_seconds": 0.0},
            "train_loss": None,
            "corpus_fingerprint": None,
            "vocab_size": len(weights["embedding.weight"]),
            "config_hash": config.config_hash(),
            "model_digest": model_digest(config.model),
            "origin": origin,
            "files": {file: (checkpoint / file).stat().st_size for file in (WEIGHTS, OPTIMIZERS)},
        }
        (checkpoint / STATE).write_text(json.dumps(state, indent=1))
        return _write_configs(folder, out, config, origin)


def _write_configs(folder: Path, out: Path, config: RunConfig, origin: str) -> str:
    """`configs/model/NAME.yaml` and `configs/experiment/NAME.yaml`; returns the command they are for."""
    name = config.model.name
    command = f"accelerate launch train.py --config-dir {shlex.quote(str(out / 'configs'))} experiment={name}"
    for group in ("model", "experiment"):
        (folder / "configs" / group).mkdir(parents=True)
    (folder / "configs" / "model" / f"{name}.yaml").write_text(
        f"# {origin}\n{yaml.safe_dump(to_dict(config.model), sort_keys=False)}"
    )
    data: dict[str, Any] = {
        "sequence_length": min(_usual_config().data.sequence_length, config.data.sequence_length),
    }
    if (folder / "tokenizer").exists():
        data["tokenizer"] = str(out / "tokenizer")
    lines = [
        "# @package _global_",
        f"# {command}",
        "# A new run from the weights beside this file. optimizer.lr= lower than for a new model keeps more of them;",
        f"# data.sequence_length= can be raised to the {config.data.sequence_length} positions they were made for.",
        "defaults:",
        f"  - override /model: {name}",
        "",
        yaml.safe_dump({"init_from": str(out), "data": data}, sort_keys=False).rstrip(),
    ]
    (folder / "configs" / "experiment" / f"{name}.yaml").write_text("\n".join(lines) + "\n")
    return command
