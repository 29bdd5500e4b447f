"""Batches as a function of (seed, step) alone, so that a resumed run sees exactly what an uninterrupted one would.

The tokens are cut into blocks of `sequence_length` targets. Every epoch is a permutation of the blocks, and batches
run on across epoch ends, so no block is ever left out. Ranks take contiguous slices of the same global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moe_train.config import BatchRampConfig
from moe_train.errors import UserError

IGNORE_INDEX = -100  # what torch's cross_entropy leaves out by default

Tokens = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]


class Batches:
    """Training batches over `tokens` (1-D, memory-mapped or not).

    Block i predicts tokens i·T+1 … i·T+T from those before; the last block is padded, so that every token but the very
    first is a target exactly once an epoch.
    """

    def __init__(
        self, tokens: Tokens, sequence_length: int, batch_size: int, seed: int, ramp: BatchRampConfig | None = None
    ) -> None:
        if len(tokens) <= sequence_length:
            raise UserError(
                f"data.sequence_length={sequence_length} is more than the training text holds ({len(tokens)} tokens): "
                "lower it or give more text"
            )
        self.num_blocks = _num_blocks(tokens, sequence_length)
        self._tokens = tokens
        self._sequence_length = sequence_length
        self._batch_size = batch_size
        # Where each batch of the ramp begins in the order of blocks, and where the first whole batch does.
        self._ramp_starts = [0] if ramp is None else _ramp_starts(ramp, batch_size, sequence_length)
        self._seed = seed
        self._orders: dict[int, npt.NDArray[np.int64]] = {}
        self._asked: tuple[int, npt.NDArray[np.int64]] | None = None  # a step is asked about several times

    def start(self, step: int) -> int:
        """How many sequences all steps before `step` have taken."""
        ramp_steps = len(self._ramp_starts) - 1
        whole = max(0, step - ramp_steps) * self._batch_size
        return self._ramp_starts[min(step, ramp_steps)] + whole

    def indices(self, step: int) -> npt.NDArray[np.int64]:
        """The blocks of the global batch of `step` (from 0): (batch size of the step,)."""
        if self._asked is not None and self._asked[0] == step:
            return self._asked[1]
        positions = np.arange(self.start(step), self.start(step + 1))
        epochs, places = np.divmod(positions, self.num_blocks)
        needed = range(int(epochs[0]), int(epochs[-1]) + 1)
        self._orders = {epoch: self._orders[epoch] if epoch in self._orders else self._order(epoch) for epoch in needed}
        blocks = np.concatenate([self._orders[epoch][places[epochs == epoch]] for epoch in needed])
        self._asked = step, blocks
        return blocks

    def num_targets(self, step: int) -> int:
        """Targets in the global batch of `step`: what its summed loss is divided by, known without asking the ranks."""
        indices = self.indices(step)
        padded = int((indices == self.num_blocks - 1).sum())
        missing = self.num_blocks * self._sequence_length - (len(self._tokens) - 1)
        return len(indices) * self._sequence_length - padded * missing

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Rank's slice of a step's batch: inputs and targets, int64, (size / world_size, sequence_length)."""
        indices = self.indices(step)
        if len(indices) % world_size:
            raise UserError(
                f"a batch of {len(indices)} sequences cannot be shared by {world_size} processes: make batch_size and "
                "batch_ramp.start multiples of that"
            )
        share = len(indices) // world_size
        blocks = indices[rank * share : (rank + 1) * share]
        return _stack(self._tokens, blocks.tolist(), self._sequence_length)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        # Sorting raw bits: numpy promises the bits of PCG64 for all versions, but not what permutation() makes of them.
        bits = np.random.PCG64([self._seed, epoch]).random_raw(self.num_blocks)
        return np.argsort(bits, kind="stable")


def _ramp_starts(ramp: BatchRampConfig, batch_size: int, sequence_length: int) -> list[int]:
    """Where in the order of blocks each batch begins, up to the first of batch_size sequences."""
    starts = [0]
    while (done := starts[-1] * sequence_length / ramp.tokens) < 1:
        size = ramp.start + (batch_size - ramp.start) * done
        starts.append(starts[-1] + ramp.start * int(size // ramp.start))
    return starts


def validation_blocks(
    tokens: Tokens,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rank's micro-batches over the first `max_tokens` targets (None: all), in order: inputs and targets, int64.

    Shapes are (rows, sequence_length) with rows ≤ batch_size. Rank r takes blocks r, r + world_size, …; blocks without
    a target fill up, so that all ranks make equally many calls of equal shape (collectives would hang otherwise).
    Over all ranks every target comes exactly once; what is padded has target -100.
    """
    if max_tokens is not None:
        tokens = tokens[: max_tokens + 1]
    per_rank = -(-_num_blocks(tokens, sequence_length) // world_size)
    blocks = range(rank, per_rank * world_size, world_size)
    for first in range(0, per_rank, batch_size):
        yield _stack(tokens, blocks[first : first + batch_size], sequence_length)


def _num_blocks(tokens: Tokens, sequence_length: int) -> int:
    return -(-(len(tokens) - 1) // sequence_length)


def _stack(tokens: Tokens, blocks: list[int] | range, sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All whole blocks at once: a row at a time takes a millisecond of 64, a third of a small model's step on a GPU."""
    first = np.asarray(blocks, dtype=np.int64)[:, None] * sequence_length
    places = first + np.arange(sequence_length + 1)
    windows = np.take(tokens, places, mode="clip")
    inputs, targets = windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)
    for row in np.nonzero(places[:, -1] >= len(tokens))[0].tolist():
        there = max(0, len(tokens) - 1 - int(first[row, 0]))
        inputs[row, there:], targets[row, there:] = 0, IGNORE_INDEX
    return torch.from_numpy(inputs), torch.from_numpy(targets)
