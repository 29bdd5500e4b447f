"""A step's tensors in the order in which they come and go, and the moment at which most are alive.

A part is what a tensor is for. Nothing here knows of models: `layer_tape` and `step_tape` write, this adds up.
"""

from __future__ import annotations

from itertools import accumulate
from operator import itemgetter

WEIGHTS, STATES, GRADIENTS = "weights", "optimizer_states", "gradients"
COPIES, GATHERED = "weight_copies", "gathered_weights"
ACTIVATIONS, HEAD_GRADIENTS, LOSS = "activations", "head_gradients", "loss_workspace"
WORKSPACE, OPTIMIZER = "workspace", "optimizer_workspace"


class Tape:
    """Bytes by part: made (positive) and let go (negative), in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def make(self, part: str, size: float) -> None:
        self.events.append((part, round(size)))

    def drop(self, part: str, size: float) -> None:
        self.events.append((part, -round(size)))

    def passing(self, part: str, size: float) -> None:
        """Something that is let go at once."""
        self.make(part, size)
        self.drop(part, size)

    def held(self, end: int | None = None) -> dict[str, int]:
        """Bytes of each part after the first `end` events."""
        parts: dict[str, int] = {}
        for part, size in self.events[:end]:
            parts[part] = parts.get(part, 0) + size
        return {part: size for part, size in parts.items() if size}

    def highest(self) -> int:
        """The number of events after which most is alive, the first such moment."""
        levels = accumulate(map(itemgetter(1), self.events))
        return 1 + max(enumerate(levels), key=lambda level: (level[1], -level[0]))[0]
