"""Checkpoints of a model that is spread over processes: each writes what it holds, while training goes on.

torch.distributed.checkpoint keeps every tensor under a name that no layout changes (`model.NAME`,
`optimizer.I.STATE.NAME`), so that any other layout and number of processes reads its own parts of it. All processes
copy what they hold and go on; a thread of each writes; the folder gets its name once rank 0 knows that all are done. A
kill in between leaves the checkpoint before.
"""

from __future__ import annotations

import shutil
import time
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor

from moe_train.errors import UserError, in_words, one_line
from moe_train.parallel.signs_of_life import is_of_the_network
from moe_train.parallel.spread import Parts
from moe_train.training.checkpoints import (
    SHARDS,
    Checkpoint,
    begin,
    check_same_tensors,
    commit,
    damaged,
    put_back,
)
from moe_train.training.new_folder import flush
from moe_train.training.spreading import MODEL, Spreading


class Saver:
    """Writes the checkpoints of a run, one at a time. Every call is made by all processes."""

    def __init__(self, run_folder: Path, spreading: Spreading, group: dist.ProcessGroup, keep_last: int) -> None:
        """group: one of the hosts' that nothing else uses."""
        self._run_folder, self._spreading, self._group, self._keep_last = run_folder, spreading, group, keep_last
        self._writing: tuple[Future[Any], Path, dict[str, Any], float] | None = None

    def save(self, state: dict[str, Any]) -> None:
        """Begin to write the step that `state` is of; returns once the tensors may change again. One at a time."""
        assert self._writing is None
        path = begin(self._run_folder, state["step"]) if dist.get_rank() == 0 else None
        box = [path]
        dist.broadcast_object_list(box, src=0)
        if box[0] is None:
            return
        began = time.monotonic()
        writing = async_save(self._spreading.tensors(), checkpoint_id=box[0] / SHARDS, process_group=self._group)
        assert isinstance(writing, Future)
        self._writing = writing, box[0], state, began

    def finish(self, wait: bool = False) -> tuple[int, float] | None:
        """Give a checkpoint that is written its name; returns its step and the seconds it took.

        None: there is none, or it is not written yet.
        """
        if self._writing is None or not (wait or self._writing[0].done()):
            return None
        (writing, path, state, began), self._writing = self._writing, None
        try:
            writing.result()
        except CheckpointException as error:  # no Exception: nobody else would know it
            shutil.rmtree(path, ignore_errors=True)
            raise _not_written(error, state["step"]) from error
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        if dist.get_rank() == 0:
            flush(path / SHARDS)
            commit(self._run_folder, path, state, self._keep_last)
        return state["step"], time.monotonic() - began


def _not_written(error: CheckpointException, step: int) -> BaseException:
    """Why a checkpoint is not there, of all that its processes said; the network's own error where that is it."""
    rank, (cause, _) = min(error.failures.items())
    if is_of_the_network(cause) or not isinstance(cause, Exception):
        return cause
    return UserError(f"process {rank} could not write its part of step_{step}: {in_words(cause)}")


def _unreadable(checkpoint: Checkpoint, error: BaseException) -> UserError:
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
    said = one_line((causes or [error])[0]).partition(". ")[0]  # torch goes on with advice not to be followed
    return damaged(checkpoint.path, f"{SHARDS}: {said}")


def _stored(checkpoint: Checkpoint) -> dict[str, TensorStorageMetadata]:
    try:
        metadata = FileSystemReader(checkpoint.path / SHARDS).read_metadata()
    except Exception as error:
        raise _unreadable(checkpoint, error) from None
    return {k: each for k, each in metadata.state_dict_metadata.items() if isinstance(each, TensorStorageMetadata)}


def _read(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` with what the checkpoint has of them; for itself, without the other processes."""
    try:
        with warnings.catch_warnings():  # it says that it is alone, as it was told
            warnings.simplefilter("ignore")
            load(tensors, checkpoint_id=checkpoint.path / SHARDS, no_dist=True)
    except (Exception, CheckpointException) as error:
        raise _unreadable(checkpoint, error) from None


def read_sharded_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All weights, whole, by name."""
    stored = {name: each for name, each in _stored(checkpoint).items() if name.startswith(MODEL)}
    weights = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in stored.items()}
    _read(checkpoint, weights)
    return {name.removeprefix(MODEL): tensor for name, tensor in weights.items()}


def read_parts_of_weights(checkpoint: Checkpoint, spreading: Spreading, expected: dict[str, torch.Size]) -> None:
    """Into the memory of the model, what this process holds of it. `expected`: names and whole shapes."""
    stored = {name.removeprefix(MODEL): e.size for name, e in _stored(checkpoint).items() if name.startswith(MODEL)}
    check_same_tensors(checkpoint.path, stored, expected)
    _read(checkpoint, spreading.tensors())


def load_spread_optimizers(checkpoint: Checkpoint, spreading: Spreading) -> None:
    """Put back what this process holds of the optimizers' states, whatever layout wrote them. Raises UserError."""
    spread = spreading.spread
    stored = _stored(checkpoint)
    wanted: dict[str, Tensor] = {}
    names: list[dict[int, dict[str, str]]] = []
    for _, prefix, members in spreading.of_optimizers():
        by_name: dict[str, list[str]] = {}
        for key in (name.removeprefix(prefix) for name in stored if name.startswith(prefix)):
            what, _, name = key.partition(".")
            by_name.setdefault(name, []).append(what)
        names.append({})
        for number, name in enumerate(members):
            names[-1][number] = {what: f"{prefix}{what}.{name}" for what in by_name.get(name, ())}
            for full_name in names[-1][number].values():
                wanted[full_name] = _room_for(stored[full_name], spread, name)
    _read(checkpoint, wanted)
    for (optimizer, _, _), by_number in zip(spreading.of_optimizers(), names, strict=True):
        state = {n: {what: _here(wanted[name]) for what, name in each.items()} for n, each in by_number.items()}
        put_back(checkpoint, optimizer, {"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _room_for(stored: TensorStorageMetadata, spread: Parts, name: str) -> Tensor:
    """For this process's part of a state of the parameter `name`."""
    dtype, local = stored.properties.dtype, spread.local(name)
    if not stored.size:  # a counter
        return torch.empty((), dtype=dtype)
    return spread.as_saved(name, torch.empty(local.shape, dtype=dtype, device=local.device))


def _here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
