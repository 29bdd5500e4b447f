"""Ctrl-C and SIGTERM end a run after the step in progress, with a checkpoint.

SIGTERM is what a scheduler sends before it takes a machine away. Of several processes each may get a signal at another
step, or not at all: after every step they agree on whether one has. SIGUSR1 and SIGUSR2 do the same where somebody
listens to them already, as submitit does, and are handed on once the checkpoint is there.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moe_train.training import before_first_step

if TYPE_CHECKING:  # grids note signals too, and have no use for torch
    import torch.distributed as dist


PASSED_ON_WITHIN = 2.0  # seconds
_BEFORE_THE_END = (signal.SIGUSR1, signal.SIGUSR2)  # what submitit has SLURM send when time is nearly up


class Interruption:
    """The signal that asked for the end, once there is one."""

    def __init__(self, alone: bool) -> None:
        self.signal: int | None = None  # that all processes know of
        self._alone = alone
        self._here: int | None = None
        self._since = 0.0  # when it came
        self._previous: dict[int, Any] = {}

    def agree(self, group: dist.ProcessGroup | None) -> None:
        """Among all processes, over `group`; the highest signal counts. None: there is one process."""
        if group is not None:
            import torch
            import torch.distributed as dist

            highest = torch.tensor(self._here or 0)
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
            self.signal = int(highest) or None

    def listen(self) -> None:
        """From now on a signal is noted instead of followed. Raises BeforeFirstStep where one came before.

        A second one is followed at once by a process that is alone, but for a SIGTERM that comes with the first: a
        scheduler tells all processes of a job, and a sweep among them passes it on. Others get several, from the
        terminal and from their launcher, one more when the first of them has ended: they go on noting them, to have
        their say, until the launcher's patience ends.
        """
        listened_to = [number for number in _BEFORE_THE_END if callable(signal.getsignal(number))]
        numbers = (signal.SIGINT, signal.SIGTERM, *listened_to)
        found = {number: signal.signal(number, self._note) for number in numbers}
        self._previous = found | before_first_step.hand_over()

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Listen until its end, from its beginning or from before."""
        if not self._previous:
            self.listen()
        try:
            yield
        finally:
            if self._alone:
                for number, handler in self._previous.items():
                    signal.signal(number, handler)

    def hand_on(self) -> None:
        """To who listened before: submitit asks its scheduler for another turn, and exits. Else nothing is done.

        Here and not in the middle of a step, where an exit that falls into one of torch's callbacks is swallowed.
        """
        if self.signal in _BEFORE_THE_END and callable(handler := self._previous.get(self.signal)):
            handler(self.signal, None)

    def _note(self, number: int, _frame: object) -> None:
        if self._alone:
            now = time.monotonic()
            if self.signal is None:
                self.signal, self._since = number, now
            elif number != signal.SIGTERM or self.signal != number or now - self._since > PASSED_ON_WITHIN:
                raise KeyboardInterrupt
        self._here = number
