"""When a run's checkpoints are written and which of them are whole: rank 0's files, or every process's part.

Parts are written while training goes on, so a step can be asked for before it is saved (sharded_checkpoints.py).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from moe_train.model.transformer import Transformer
from moe_train.training.checkpoints import save_checkpoint
from moe_train.training.closing import Closing
from moe_train.training.runtime import Runtime

if TYPE_CHECKING:
    from moe_train.training.sharded_checkpoints import Saver


class Saving:
    """`saver`: of parts; None: rank 0 has all there is to save. `step`: of the checkpoint it goes on from, if any."""

    def __init__(
        self,
        path: Path,
        runtime: Runtime,
        model: Transformer,
        optimizers: list[Optimizer],
        closing: Closing,
        saver: Saver | None,
        *,
        keep_last: int,
        step: int | None,
    ) -> None:
        self._path, self._runtime, self._model, self._optimizers = path, runtime, model, optimizers
        self._closing, self._saver, self._keep_last = closing, saver, keep_last
        self.saved_step = self.asked_step = step  # whole, and asked to be written

    def save(self, state: dict[str, Any]) -> None:
        """Of the step in `state`. Needs all processes."""
        self.asked_step = state["step"]
        if self._saver is not None:
            self.take_note(wait=True)
            self._saver.save(state)
            return
        began = time.monotonic()
        if self._runtime.is_main:
            save_checkpoint(self._path, self._model, self._optimizers, state, self._keep_last)
        self._runtime.accelerator.wait_for_everyone()
        self._closing.checkpoint_took(time.monotonic() - began)
        self.saved_step = self.asked_step

    def take_note(self, *, wait: bool = False) -> None:
        """Of a checkpoint that is written while training goes on: that it has become whole, or once it is."""
        written = None if self._saver is None else self._saver.finish(wait)
        if written is not None:
            self.saved_step, seconds = written
            self._closing.checkpoint_took(seconds)
