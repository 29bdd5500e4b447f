"""Checkpoints that a kill cannot spoil: written beside, flushed, then renamed into place.

A checkpoint is a folder `step_N` of three files: `model.safetensors` (the weights, FP32), `optimizers.pt` (tensors
only, read with weights_only=True) and `state.json` (counters, what model and text it belongs to, and the sizes of all
others, so that a truncated file is noticed before anything is loaded). No random state is kept: batches and dropout are
functions of (seed, step). A model whose parts are on different processes leaves shards in place of the first two files
(sharded_checkpoints.py); here either form is read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_train.errors import UserError, one_line
from moe_train.parallel.spread import Part
from moe_train.training.new_folder import flush

WEIGHTS, OPTIMIZERS, STATE = "model.safetensors", "optimizers.pt", "state.json"
SHARDS = "shards"  # a folder of torch.distributed.checkpoint


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk and what its state.json says."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def in_shards(self) -> bool:
        return WEIGHTS not in self.state["files"]

    @property
    def vocab_size(self) -> int:
        return int(self._stated("vocab_size", int))

    @property
    def corpus_fingerprint(self) -> str | None:
        """Of the text it was trained on; None of weights from elsewhere."""
        stated: str | None = self._stated("corpus_fingerprint", str, type(None))
        return stated

    def _stated(self, key: str, *kinds: type) -> Any:
        if key not in self.state or not isinstance(self.state[key], kinds):
            raise damaged(self.path, f"{STATE} has no {key}")
        return self.state[key]


def checkpoint_paths(run_folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = [p for p in (run_folder / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def save_checkpoint(
    run_folder: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    state: dict[str, Any],
    keep_last: int,
) -> Path:
    """Write `checkpoints/step_N` for state["step"] = N, then remove all but the newest `keep_last`."""
    temporary = begin(run_folder, state["step"])
    if temporary is None:
        return checkpoint_path(run_folder, state["step"])
    try:
        write_whole(temporary, model, optimizers)
        return commit(run_folder, temporary, state, keep_last)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def checkpoint_path(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step_{step}"


def begin(run_folder: Path, step: int) -> Path | None:
    """A folder to write a checkpoint in, beside its place; None where it is there already."""
    final = checkpoint_path(run_folder, step)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():  # the run went on from this very step: it is the same checkpoint
        return None
    for stale in final.parent.glob(".writing-*"):  # left by a kill; the run folder's lock says nobody is writing now
        shutil.rmtree(stale)
    temporary = final.parent / f".writing-{final.name}"
    temporary.mkdir()
    return temporary


def write_whole(folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Weights and optimizer states as one file each, flushed."""
    save_file({name: t.detach().contiguous() for name, t in model.state_dict().items()}, folder / WEIGHTS)
    torch.save([optimizer.state_dict() for optimizer in optimizers], folder / OPTIMIZERS)
    for name in (WEIGHTS, OPTIMIZERS):
        flush(folder / name)


def commit(run_folder: Path, temporary: Path, state: dict[str, Any], keep_last: int) -> Path:
    """Write the state beside what `temporary` holds, give it its name, and remove all but the newest `keep_last`."""
    (temporary / STATE).write_text(json.dumps({**state, "files": sizes_of(temporary)}, indent=1))
    flush(temporary / STATE)
    final = checkpoint_path(run_folder, state["step"])
    os.rename(temporary, final)
    flush(final.parent)
    for old in checkpoint_paths(run_folder)[:-keep_last]:
        doomed = old.parent / f".writing-{old.name}"  # renamed first: half removed it must not look like a checkpoint
        os.rename(old, doomed)
        shutil.rmtree(doomed)
    return final


def sizes_of(folder: Path) -> dict[str, int]:
    """Bytes of every file of a checkpoint but its state."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != STATE)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's state and check that its files are whole. Raises UserError for anything damaged."""
    try:
        state = json.loads((path / STATE).read_text())
        sizes = {str(name): int(size) for name, size in state["files"].items()}
        int(state["step"])
        if not {WEIGHTS, OPTIMIZERS} <= sizes.keys() and f"{SHARDS}/.metadata" not in sizes:
            raise KeyError
    except FileNotFoundError:
        raise UserError(
            f"{path} is no checkpoint: it has no {STATE}; give a run folder or a checkpoints/step_N"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError):
        raise damaged(path, f"{STATE} cannot be read") from None
    for name, expected in sizes.items():
        actual = (path / name).stat().st_size if (path / name).exists() else 0
        if actual != expected:
            raise damaged(path, f"{name} has {actual:,} bytes instead of {expected:,}")
    return Checkpoint(path, state)


def damaged(path: Path, reason: str) -> UserError:
    others = [p.name for p in checkpoint_paths(path.parent.parent) if p != path]
    remedy = "put back a whole copy of it, or "
    remedy += f"remove it, and {others[-1]} is the newest" if others else "train again in another run_dir"
    return UserError(f"the checkpoint {path} is damaged ({reason}): {remedy}")


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The checkpoint's tensors by name."""
    if checkpoint.in_shards:
        from moe_train.training.sharded_checkpoints import read_sharded_weights

        return read_sharded_weights(checkpoint)
    try:
        return load_file(checkpoint.path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise damaged(checkpoint.path, f"{WEIGHTS}: {one_line(error)}") from None


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Put the checkpoint's weights into `model`, which must have the same tensors."""
    weights = read_weights(checkpoint)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    check_same_tensors(checkpoint.path, {name: tensor.shape for name, tensor in weights.items()}, expected)
    model.load_state_dict(weights)


def check_same_tensors(path: Path, found: dict[str, torch.Size], expected: dict[str, torch.Size]) -> None:
    """Of the same names and shapes. Raises UserError."""
    for name in sorted(set(found) ^ set(expected)):
        where = "only in the checkpoint" if name in found else "missing from the checkpoint"
        raise UserError(
            f"{path} is a checkpoint of another model: {name} is {where}; give the model it was trained with"
        )
    for name, shape in found.items():
        if shape != expected[name]:
            raise UserError(
                f"{path} is a checkpoint of another model: {name} is {tuple(shape)} there and "
                f"{tuple(expected[name])} here; give the model it was trained with"
            )


def load_optimizers(
    checkpoint: Checkpoint,
    optimizers: list[torch.optim.Optimizer],
    part_of: Callable[[Tensor], Part] | None = None,
) -> None:
    """Put the checkpoint's optimizer states back; they must be the same optimizers over the same tensors.

    From one file; `part_of` says which part of a tensor is here where not all of it is.
    """
    try:
        states = torch.load(checkpoint.path / OPTIMIZERS, weights_only=True, map_location="cpu")
    except Exception as error:
        raise damaged(checkpoint.path, f"{OPTIMIZERS}: {one_line(error)}") from None
    if len(states) != len(optimizers):
        raise UserError(f"{checkpoint.path} was written with another optimizer: give the one it was trained with")
    for optimizer, state in zip(optimizers, states, strict=True):
        if part_of is not None:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            for number, parameter in zip(numbers, parameters):
                whole = state["state"].get(number, {})
                mine = {k: part_of(parameter).of(v).clone() if v.ndim else v for k, v in whole.items()}
                state["state"][number] = mine
        put_back(checkpoint, optimizer, state)


def put_back(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer the state that a checkpoint has of it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{checkpoint.path} was written with another optimizer ({one_line(error)}): give that one"
        ) from None
