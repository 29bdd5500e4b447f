"""What the processes of a run exchange, by kind: bytes sent, and seconds that a step waited or did not notice.

    weights          gathered from the processes that have parts of them
    gradients        summed, by reduce-scatter or all-reduce
    dispatch         towards experts: tokens, and backwards the gradients of what experts made of them
    combine          back from experts: what they made of tokens, and backwards the gradients of tokens
    whole_matrices   for Muon's iteration, there and back, or its results alone where all had them
    other            norms, counts, agreement

An exchange takes from its beginning to its end. What of that a step stood still for is exposed, the rest hidden behind
computation. Waiting for a process that is late is part of it. Figures are means over the processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

Interval = tuple[float, float]  # seconds, beginning and end

KINDS = ("weights", "gradients", "dispatch", "combine", "whole_matrices", "other")


def merged(intervals: Sequence[Interval]) -> list[Interval]:
    """The same stretches of time, in order and without overlaps."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def length(intervals: Sequence[Interval]) -> float:
    """Seconds of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def common(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """What two lists of disjoint intervals, each in order, share."""
    found: list[Interval] = []
    i = j = 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < end:
            found.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


@dataclass
class Exchanged:
    """Sums over some steps. Only some of them are timed."""

    sent: dict[str, float]  # bytes, by kind
    exposed: dict[str, float]  # seconds of timed steps, by kind
    hidden: dict[str, float]
    steps: float = 0.0
    timed_steps: float = 0.0
    timed_seconds: float = 0.0
    waited_seconds: float = 0.0  # of timed steps; kinds that ran at the same time count once
    sent_outside: float = 0.0  # bytes, between steps: logging, evaluation, checkpoints

    @classmethod
    def nothing(cls) -> Self:
        sent, exposed, hidden = (dict.fromkeys(KINDS, 0.0) for _ in range(3))
        return cls(sent, exposed, hidden)

    def add_times(self, by_kind: Mapping[str, Sequence[Interval]], stalls: Sequence[Interval], seconds: float) -> None:
        """A timed step: when exchanges of each kind were under way, when the step stood still, and how long it took."""
        stood = merged(stalls)
        for kind, intervals in by_kind.items():
            under_way = merged(intervals)
            exposed = length(common(under_way, stood))
            self.exposed[kind] += exposed
            self.hidden[kind] += length(under_way) - exposed
        everything = merged([each for intervals in by_kind.values() for each in intervals])
        self.waited_seconds += length(common(everything, stood))
        self.timed_steps += 1
        self.timed_seconds += seconds

    def numbers(self) -> list[float]:
        """All of it, to be summed over processes."""
        mine = [table[kind] for table in (self.sent, self.exposed, self.hidden) for kind in KINDS]
        return [
            *mine,
            *(self.steps, self.timed_steps, self.timed_seconds, self.waited_seconds, self.sent_outside),
        ]

    @classmethod
    def of(cls, numbers: Sequence[float], processes: int) -> Self:
        """The mean of `processes`, from the sum of their `numbers`."""
        means = [each / processes for each in numbers]
        sent, exposed, hidden = (dict(zip(KINDS, means[n * len(KINDS) :])) for n in range(3))
        return cls(sent, exposed, hidden, *means[3 * len(KINDS) :])

    def __add__(self, other: Exchanged) -> Exchanged:
        return Exchanged.of([a + b for a, b in zip(self.numbers(), other.numbers())], 1)

    @property
    def exposed_fraction(self) -> float | None:
        """Share of a step for which it waited; None where no step was timed."""
        return self.waited_seconds / self.timed_seconds if self.timed_seconds else None

    def a_step(self) -> dict[str, dict[str, float | None]]:
        """Bytes and seconds a step of each kind that there was."""
        found: dict[str, dict[str, float | None]] = {}
        for kind in KINDS:
            if self.sent[kind]:
                found[kind] = {
                    "bytes": self.sent[kind] / self.steps if self.steps else None,
                    "exposed_seconds": self._timed(self.exposed[kind]),
                    "hidden_seconds": self._timed(self.hidden[kind]),
                }
        return found

    def _timed(self, seconds: float) -> float | None:
        return seconds / self.timed_steps if self.timed_steps else None

    @property
    def bytes_a_step(self) -> float | None:
        return sum(self.sent.values()) / self.steps if self.steps else None

    def metrics(self) -> dict[str, float | None]:
        """For the log."""
        by_kind = {f"comm/{kind}/{name}": v for kind, found in self.a_step().items() for name, v in found.items()}
        return {
            "comm/bytes": self.bytes_a_step,
            "comm/exposed_seconds": self._timed(self.waited_seconds),
            "comm/exposed_fraction": self.exposed_fraction,
            **by_kind,
        }
