"""From the shards of a checkpoint to `model.safetensors` and `optimizers.pt`, in its place.

The files are written beside the shards, then the state is replaced by one that names them, then the shards are removed:
whatever interrupts it, there is a whole checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import filelock
import torch
from torch import nn

from moe_train.errors import UserError
from moe_train.model.transformer import Transformer
from moe_train.parallel.spread import Whole
from moe_train.training.checkpoints import SHARDS, STATE, load_weights, sizes_of, write_whole
from moe_train.training.new_folder import flush
from moe_train.training.optimizers import build_optimizers
from moe_train.training.run_folder import find_checkpoint, load_run_config
from moe_train.training.spreading import Spreading
from moe_train.training.starting_weights import check_own_config


def consolidate(run: Path) -> Path:
    """The checkpoint, which is in files afterwards. Needs memory for all of it, and no other process.

    Raises UserError: there is none, it is damaged, it is in files already, or its run is going on.
    """
    checkpoint = find_checkpoint(run, "run")
    folder = checkpoint.path.parent.parent
    if not checkpoint.in_shards and not (checkpoint.path / SHARDS).exists():
        raise UserError(f"{checkpoint.path} is in files already: there is nothing to do")
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"the run in {folder} is going on: wait for its end, or copy the checkpoint first") from None
    if not checkpoint.in_shards:  # cut short after the files were whole
        shutil.rmtree(checkpoint.path / SHARDS)
        lock.release()
        return checkpoint.path
    config = load_run_config(folder)
    check_own_config(checkpoint, config)
    model = Transformer(config.model.resolved(), checkpoint.vocab_size)
    load_weights(checkpoint, model)
    optimizers = build_optimizers(model, config.optimizer, config.seed)
    Spreading(model, Whole(model), optimizers).load_optimizers(checkpoint)
    _replace(checkpoint.path, checkpoint.state, model, optimizers)
    lock.release()
    return checkpoint.path


def _replace(path: Path, state: dict[str, object], model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    beside = path / ".writing"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    write_whole(beside, model, optimizers)
    sizes = sizes_of(beside)
    (beside / STATE).write_text(json.dumps({**state, "files": sizes}, indent=1))
    flush(beside / STATE)
    for name in sizes:
        os.rename(beside / name, path / name)
    os.rename(beside / STATE, path / STATE)
    flush(path)
    beside.rmdir()
    shutil.rmtree(path / SHARDS)
