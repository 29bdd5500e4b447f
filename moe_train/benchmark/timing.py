"""Seconds of several arms, taken in turn, so that what else the machine does falls on all of them alike.

A round times every arm once, each round beginning with the next one. On a GPU the device is waited for before and after
a measurement, since calls only queue work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]

_ENOUGH = 3  # rounds that are made however slow they are


def interleaved(
    arms: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int,
    budget_seconds: float = math.inf,
    shortest_seconds: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds a call of each arm, a value a round: `rounds` of them, or fewer (3 at least) if the budget is spent.

    Every arm is first called twice: the first call loads and tunes kernels, the second tells how many calls fill
    `shortest_seconds`, below which a clock and a launch weigh too much.
    """
    calls = {}
    for name, run in arms.items():
        run()
        once = seconds_a_call(run, device)
        calls[name] = max(1, math.ceil(shortest_seconds / max(once, 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    order = list(arms)
    began = time.perf_counter()
    for done in range(rounds):
        if done >= _ENOUGH and time.perf_counter() - began > budget_seconds:
            break
        for name in order[done % len(order) :] + order[: done % len(order)]:
            seconds[name].append(seconds_a_call(arms[name], device, calls[name]))
    return seconds


def seconds_a_call(run: Call, device: torch.device, calls: int = 1) -> float:
    """The mean of `calls` calls in a row."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - began) / calls


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
