"""Two clocks and so two costs of a run: training steps only, and everything from the start of the process.

`usd_train` prices the seconds spent in training steps: what a technique costs. `usd_total` prices the wall clock with
start-up, compilation, evaluation, checkpoints and earlier attempts: what the bill says. Both are shown. What cannot be
known (no price, no peak rate, no token yet) is None.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from moe_train.cost.communication import Exchanged
from moe_train.cost.price import Price


def _is_launcher(command_line: Sequence[str]) -> bool:
    """`accelerate launch`, `accelerate-launch`, `torchrun`, or one of them as `python -m …`."""
    names = {os.path.basename(argument) for argument in command_line}
    modules = {"accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run"}
    return bool(names & modules) or {"accelerate", "launch"} <= names


def process_start_seconds_ago() -> float:
    """Seconds since this process began, or since its launcher did: the start-up of the launcher is rented too."""
    import psutil

    process = psutil.Process()
    with contextlib.suppress(psutil.Error):  # a parent that is gone or another user's is not our launcher
        while (parent := process.parent()) is not None and _is_launcher(parent.cmdline()):
            process = parent
    created = process.create_time()
    if sys.platform == "linux":
        # psutil adds the boot time, which the kernel tells in whole seconds: without it the age is good to 10 ms.
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - (created - psutil.boot_time()))
    return max(0.0, time.time() - created)


@dataclass(frozen=True)
class Work:
    """What training one token takes, and how fast one device could do it at best. None is unknown."""

    flops: float  # of the model, see flops.py
    recomputed_flops: float  # done a second time by activation checkpointing
    ideal_seconds: float | None  # on one device, each product at the peak of its own format, see utilization.py
    peak_tflops: float | None  # of one device, in the format of the linear layers


class Meter:
    """Counts tokens, FLOPs, seconds, joules and dollars of a run over all its devices and attempts.

    `price` is of one device, of which the run holds `num_devices`. `already_elapsed` is the age of the process in
    seconds; `earlier_wall_seconds` and `earlier_usd` are what earlier attempts took, see `ledger.py`. `clock` tells
    seconds.
    """

    def __init__(
        self,
        *,
        price: Price,
        num_devices: int,
        work: Work | None = None,
        clock: Callable[[], float] = time.monotonic,
        already_elapsed: float = 0.0,
        earlier_wall_seconds: float = 0.0,
        earlier_usd: float | None = 0.0,
    ) -> None:
        self.tokens = 0
        self.train_seconds = 0.0  # of the steps that made this model: those lost to a crash are in the wall clock only
        self.attempt_train_seconds = 0.0  # of this process
        self.steps_of_attempt = 0
        self.work = work or Work(0.0, 0.0, None, None)
        self.exchanged: Exchanged | None = None  # of this process's attempt, by several; None: there is one
        self.exposed_seconds = 0.0  # of the train clock: what steps waited for exchanges, as the timed ones did
        self._flops_before = 0.0  # taken up from a checkpoint
        self._tokens_before = 0
        # Of its steps, which may have run on other devices, as many or not, and in another precision; None: not known.
        self._recomputed_before: float | None = 0.0  # FLOPs
        self._attainable_before: float | None = 0.0  # FLOPs at the peak rate
        self._device_seconds_before: float | None = 0.0
        self._ideal_before: float | None = 0.0  # of them, if every product had run at the peak of its format
        self._usd_train_before: float | None = 0.0
        self._price = price
        self._num_devices = num_devices
        self._clock = clock
        self._began = clock() - already_elapsed
        self._earlier_wall_seconds = earlier_wall_seconds
        self._earlier_usd = earlier_usd
        self._joules: float | None = None
        self._train_joules: float | None = None
        self._joules_read_at = self._began
        self._train_seconds_read = 0.0
        self._training = False
        self._open_window()

    def _open_window(self) -> None:
        self._window_steps = 0
        self._window_tokens = 0
        self._window_seconds = 0.0
        self._window_data_wait = 0.0
        self._window_exchanged: Exchanged | None = None

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """One optimizer step on the train clock; evaluation and checkpoints lie outside. Nested use counts once.

        GPU work is asynchronous: synchronise before leaving the last step ahead of anything that is not training.
        """
        if self._training:
            yield
            return
        self._training = True
        start = self._clock()
        try:
            yield
        finally:
            self._training = False
            seconds = self._clock() - start
            self.train_seconds += seconds
            self.attempt_train_seconds += seconds
            self._window_seconds += seconds
            self._window_steps += 1
            self.steps_of_attempt += 1

    def add_tokens(self, count: int) -> None:
        """Trained tokens, over all devices."""
        self.tokens += count
        self._window_tokens += count

    @property
    def flops(self) -> float:
        """Of the model, over all trained tokens."""
        return self._flops_before + self.attempt_tokens * self.work.flops

    @property
    def attempt_tokens(self) -> int:
        """Of this process."""
        return self.tokens - self._tokens_before

    def data_wait(self, seconds: float) -> None:
        """Seconds of the train clock that a step spent waiting for its batch."""
        self._window_data_wait += seconds

    def exchange(self, exchanged: Exchanged) -> None:
        """What processes exchanged since the last window was opened. A window whose steps were not timed waited as
        those before it did."""
        self._window_exchanged = exchanged
        self.exchanged = exchanged if self.exchanged is None else self.exchanged + exchanged
        fraction = exchanged.exposed_fraction
        if fraction is None:
            fraction = self.exchanged.exposed_fraction
        self.exposed_seconds += (fraction or 0.0) * self._window_seconds

    @property
    def usd_communication(self) -> float | None:
        """The part of `usd_train` for which steps waited for exchanges; None where there were none."""
        fraction = _ratio(self.exposed_seconds, self.train_seconds)
        usd = self.usd_train
        return None if self.exchanged is None or fraction is None or usd is None else usd * fraction

    def stopped(self) -> Meter:
        """A copy whose clock stands still, so that all figures read from it are of one moment."""
        at = self._clock()
        still = copy.copy(self)
        still._clock = lambda: at
        return still

    @property
    def attempt_wall_seconds(self) -> float:
        """Since this process (or its launcher) began."""
        return self._clock() - self._began

    @property
    def wall_seconds(self) -> float:
        """Of all attempts."""
        return self._earlier_wall_seconds + self.attempt_wall_seconds

    def read_energy(self, joules: float | None, train_joules: float | None) -> None:
        """Energy of all devices in this attempt so far, as just read: in all, and while training."""
        self._joules, self._train_joules = joules, train_joules
        self._joules_read_at = self._clock()
        self._train_seconds_read = self.attempt_train_seconds

    def joules_until_now(self) -> float | None:
        """The last reading, carried on at its mean power."""
        if self._joules is None:
            return None
        known_for = self._joules_read_at - self._began
        return self._joules * (self.attempt_wall_seconds / known_for if known_for > 0 else 1.0)

    def usd(self, seconds: float, joules: float | None) -> float | None:
        """What all devices of the run cost for as long, having drawn as much."""
        return self._price.usd(seconds * self._num_devices, joules)

    def usd_ahead(self, seconds: float) -> float:
        """What the next `seconds` will cost, at the mean power so far; 0 where there is no price."""
        known_for = self._joules_read_at - self._began
        joules = None if self._joules is None else self._joules / known_for * seconds if known_for > 0 else 0.0
        return self.usd(seconds, joules) or 0.0

    @property
    def attempt_usd(self) -> float | None:
        """What this attempt costs so far."""
        return self.usd(self.attempt_wall_seconds, self.joules_until_now())

    @property
    def attempt_usd_train(self) -> float | None:
        """What its training steps cost."""
        joules = self._train_joules
        if joules is not None and self._train_seconds_read:  # steps since the last reading drew as the ones before
            joules *= self.attempt_train_seconds / self._train_seconds_read
        return self.usd(self.attempt_train_seconds, joules)

    @property
    def attempt_usd_of_energy(self) -> float | None:
        return self._price.usd_of_energy(self.joules_until_now())

    @property
    def usd_train(self) -> float | None:
        return _sum(self._usd_train_before, self.attempt_usd_train)

    @property
    def usd_total(self) -> float | None:
        return _sum(self._earlier_usd, self.attempt_usd)

    @property
    def usd_per_million_tokens(self) -> float | None:
        """Of the training steps."""
        return _ratio(self.usd_train, self.tokens / 1e6)

    @property
    def usd_per_million_tokens_all_in(self) -> float | None:
        """Of the whole bill."""
        return _ratio(self.usd_total, self.tokens / 1e6)

    @property
    def tokens_per_second(self) -> float | None:
        return _ratio(self.tokens, self.train_seconds)

    @property
    def model_flops_utilization(self) -> float | None:
        """Share of the devices' peak rate that the model's own FLOPs took, over the training steps."""
        return _share(self.flops, self._attainable)

    @property
    def hardware_flops_utilization(self) -> float | None:
        """The same with what activation checkpointing did a second time."""
        return _share(_sum(self.flops, self._recomputed), self._attainable)

    @property
    def mixed_precision_utilization(self) -> float | None:
        """Time the model's products would take at the peaks of their own formats, over the time the steps took."""
        return _share(self._ideal, self._device_seconds)

    @property
    def _device_seconds(self) -> float | None:
        return _sum(self._device_seconds_before, self.attempt_train_seconds * self._num_devices)

    @property
    def _ideal(self) -> float | None:
        ideal = self.work.ideal_seconds
        return _sum(self._ideal_before, None if ideal is None else self.attempt_tokens * ideal)

    @property
    def _recomputed(self) -> float | None:
        return _sum(self._recomputed_before, self.attempt_tokens * self.work.recomputed_flops)

    @property
    def _attainable(self) -> float | None:
        return _sum(self._attainable_before, self._attainable_in(self.attempt_train_seconds))

    def _attainable_in(self, seconds: float) -> float | None:
        """FLOPs of all devices at their peak rate."""
        peak = self.work.peak_tflops
        return None if peak is None else seconds * peak * 1e12 * self._num_devices

    def window(self) -> dict[str, float | None]:
        """Metrics for the log: throughput of the steps since the last call; progress and costs since the beginning."""
        tokens_per_second = _ratio(self._window_tokens, self._window_seconds)
        metrics = {
            "throughput/tokens_per_second": tokens_per_second,
            "throughput/tokens_per_second_per_device": _ratio(tokens_per_second, self._num_devices),
            "throughput/model_flops_utilization": _share(
                self._window_tokens * self.work.flops, self._attainable_in(self._window_seconds)
            ),
            "throughput/step_seconds": _ratio(self._window_seconds, self._window_steps),
            "throughput/data_wait_fraction": _ratio(self._window_data_wait, self._window_seconds),
            "cost/usd_train": self.usd_train,
            "cost/usd_total": self.usd_total,
            "cost/usd_per_million_tokens": self.usd_per_million_tokens,
            "progress/tokens": self.tokens,
            "progress/flops": self.flops,
        }
        if self._window_exchanged is not None:
            metrics |= self._window_exchanged.metrics() | {"cost/usd_communication": self.usd_communication}
        self._open_window()
        return metrics

    def state_dict(self) -> dict[str, float | None]:
        """What a checkpoint keeps: plain numbers."""
        return {
            "tokens": self.tokens,
            "flops": self.flops,
            "train_seconds": self.train_seconds,
            "exposed_seconds": self.exposed_seconds,
            "usd_train": self.usd_train,
            "recomputed_flops": self._recomputed,
            "attainable_flops": self._attainable,
            "device_seconds": self._device_seconds,
            "ideal_device_seconds": self._ideal,
        }

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Go on from a checkpoint: seconds that an earlier attempt trained beyond it are in its wall time only."""
        self.tokens = self._tokens_before = int(state["tokens"] or 0)
        self._flops_before = float(state["flops"] or 0.0)
        self.train_seconds = float(state["train_seconds"] or 0.0)
        self.exposed_seconds = float(state.get("exposed_seconds") or 0.0)
        self._usd_train_before = state.get("usd_train")
        self._recomputed_before = state.get("recomputed_flops")
        self._attainable_before = state.get("attainable_flops")
        self._device_seconds_before = state.get("device_seconds")
        self._ideal_before = state.get("ideal_device_seconds")


def _ratio(value: float | None, per: float) -> float | None:
    return None if value is None or per == 0 else value / per


def _share(value: float | None, of: float | None) -> float | None:
    return None if value is None or not of else value / of


def _sum(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
