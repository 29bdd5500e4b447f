"""From a trained dense run to a starting point whose FFNs are experts; what becomes of the weights is model/upcycling.

dense run's newest checkpoint ─► upcycled weights ─► starting point ─► train.py experiment=NAME
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch

from moe_train.config import ModelConfig
from moe_train.cost.flops import parameter_counts
from moe_train.errors import UserError
from moe_train.model.transformer import Transformer
from moe_train.model.upcycling import upcycled
from moe_train.training.checkpoints import read_weights
from moe_train.training.new_folder import check_free
from moe_train.training.run_folder import find_checkpoint, load_run_config
from moe_train.training.starting_point import check_name, starting_config, write_starting_point
from moe_train.training.starting_weights import tokenizer_of


class UpcycledRun(NamedTuple):
    name: str
    total_params: int
    active_params: int
    command: str  # that trains from it


def upcycle_run(run: Path, out: Path, mixture: ModelConfig, name: str, seed: int) -> UpcycledRun:
    """Write the starting point of `mixture` made of the dense model of `run` (a run folder or checkpoint) to `out`.

    Raises UserError where that is no dense model or the mixture could not start as the same function.
    """
    check_free(out)
    check_name(name)
    checkpoint = find_checkpoint(run, "run")
    folder = checkpoint.path.parent.parent
    config = load_run_config(folder)
    if config.model.resolved().moe is not None:
        raise UserError(f"run={folder}: {config.model.name} is a mixture of experts already: give a dense run")
    vocab_size = checkpoint.vocab_size
    mixture = dataclasses.replace(mixture.resolved(), name=name, vocab_size=vocab_size)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in Transformer(mixture, vocab_size).state_dict().items()}
    weights = upcycled(read_weights(checkpoint), mixture, shapes, seed)
    tokenizer = tokenizer_of(checkpoint)
    start = starting_config(mixture, out.absolute() / "tokenizer", config.data.sequence_length)
    origin = f"upcycled from the dense {config.model.name} of {folder.name}, step {checkpoint.step}"
    command = write_starting_point(out, start, weights, tokenizer, origin)
    counts = parameter_counts(mixture, vocab_size)
    return UpcycledRun(name, counts.total, counts.active, command)
