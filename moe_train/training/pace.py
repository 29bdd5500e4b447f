"""How far the host may run ahead of a GPU in a run that a clock ends.

Calls only queue work. What the clock says after a step is of the host alone, which can have queued all steps up to the
next row of the log: a limit that is then seen to be reached is passed by as many steps. One step ahead is enough for
the GPU never to wait for the host.
"""

from __future__ import annotations

from typing import Literal

import torch


def pace_of(device_type: Literal["cpu", "cuda"], uses_clock: bool) -> OneStepAhead | None:
    """None: the host waits for every step anyway, or may be as far ahead as it likes."""
    return OneStepAhead() if device_type == "cuda" and uses_clock else None


class OneStepAhead:
    def __init__(self) -> None:
        self._queued: torch.cuda.Event | None = None  # behind the last step

    def follow(self) -> None:
        """After a step was queued: wait for the one before it."""
        before, self._queued = self._queued, torch.cuda.Event()
        self._queued.record()
        if before is not None:
            before.synchronize()
