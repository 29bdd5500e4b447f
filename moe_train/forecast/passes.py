"""What work costs in each pass of training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Passes:
    """Seconds (or bytes) a token: forward, backward without weight gradients, weight gradients."""

    forward: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.inputs + other.inputs, self.weights + other.weights)

    def __mul__(self, factor: float) -> Passes:
        return Passes(self.forward * factor, self.inputs * factor, self.weights * factor)

    @property
    def seconds(self) -> float:
        return self.forward + self.inputs + self.weights
