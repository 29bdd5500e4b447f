"""Whether wandb still gets through: what its own process has been trying to send, and for how long.

wandb says nothing while it tries again, and its public status is empty (0.31). What it shows while a run finishes, the
operations under way with the seconds they have taken, can be asked for at any time; that is not a public interface, so
where it is not there any more, nothing is known and nothing is said.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from moe_train.errors import one_line

_SECONDS_BETWEEN_QUESTIONS = 10.0
_PATIENCE_SECONDS = 30.0  # wandb sends rows every 15 s; a request to a server that answers takes less than one
_ANSWER_SECONDS = 0.5  # of wandb's process on this machine, which takes 5 ms


class Watch:
    """Of an online `run`, a wandb.Run."""

    def __init__(self, run: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._clock = run, clock
        self._asked_at = clock()

    def silence(self, now: bool = False) -> str | None:
        """What wandb has been waiting for in vain; None if it gets through. Asks now and then only, or `now`."""
        if not now and self._clock() - self._asked_at < _SECONDS_BETWEEN_QUESTIONS:
            return None
        self._asked_at = self._clock()
        try:
            from wandb.proto import wandb_internal_pb2

            messages: Any = wandb_internal_pb2
            record = messages.Record(request=messages.Request(operations=messages.OperationStatsRequest()))
            answer = self._run._interface._deliver(record).wait_or(timeout=_ANSWER_SECONDS)
            operations = answer.response.operations_response.operation_stats.operations
            oldest = max(operations, key=lambda operation: operation.runtime_seconds, default=None)
            if oldest is None or oldest.runtime_seconds < _PATIENCE_SECONDS:
                return None
            why = f": {one_line(oldest.error_status)}" if oldest.error_status else ""
            return f"has not answered for {oldest.runtime_seconds:.0f} s ({oldest.desc}{why})"
        except Exception:
            return None
