"""Two clocks and so two costs of a run: training steps only, and everything from the start of the process.

`usd_train` prices the seconds spent in training steps: what a technique costs. `usd_total` prices the wall clock with
start-up, compilation, evaluation, checkpoints and earlier attempts: what the bill says. Both are shown. What cannot be
known (no price, no peak rate, no token yet) is None.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence


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


class Meter:
    """Counts tokens, FLOPs, seconds and dollars of a run over all its devices and attempts.

    `price_usd_per_hour` and `peak_tflops_per_device` are for one device, of which the run holds `num_devices`.
    `flops_per_token` is for training, see `flops.py`. `already_elapsed` is the age of the process in seconds,
    `earlier_wall_seconds` the wall time of earlier attempts, see `ledger.py`. `clock` tells seconds.
    """

    def __init__(
        self,
        *,
        price_usd_per_hour: float | None,
        num_devices: int,
        flops_per_token: float,
        peak_tflops_per_device: float | None,
        clock: Callable[[], float] = time.monotonic,
        already_elapsed: float = 0.0,
        earlier_wall_seconds: float = 0.0,
    ) -> None:
        self.tokens = 0
        self.flops = 0.0
        self.train_seconds = 0.0  # of the steps that made this model: those lost to a crash are in the wall clock only
        self.attempt_train_seconds = 0.0  # of this process
        self._price = price_usd_per_hour
        self._num_devices = num_devices
        self._flops_per_token = flops_per_token
        self._peak = peak_tflops_per_device
        self._clock = clock
        self._began = clock() - already_elapsed
        self._earlier_wall_seconds = earlier_wall_seconds
        self._training = False
        self._open_window()

    def _open_window(self) -> None:
        self._window_steps = 0
        self._window_tokens = 0
        self._window_flops = 0.0
        self._window_seconds = 0.0
        self._window_data_wait = 0.0

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

    def add_tokens(self, count: int) -> None:
        """Trained tokens, over all devices."""
        flops = count * self._flops_per_token
        self.tokens += count
        self.flops += flops
        self._window_tokens += count
        self._window_flops += flops

    def data_wait(self, seconds: float) -> None:
        """Seconds of the train clock that a step spent waiting for its batch."""
        self._window_data_wait += seconds

    @property
    def attempt_wall_seconds(self) -> float:
        """Since this process (or its launcher) began."""
        return self._clock() - self._began

    @property
    def wall_seconds(self) -> float:
        """Of all attempts."""
        return self._earlier_wall_seconds + self.attempt_wall_seconds

    def usd(self, seconds: float) -> float | None:
        """What all devices of the run cost for as long."""
        return None if self._price is None else self._price * self._num_devices * seconds / 3600

    @property
    def usd_train(self) -> float | None:
        return self.usd(self.train_seconds)

    @property
    def usd_total(self) -> float | None:
        return self.usd(self.wall_seconds)

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
        return self._utilization(self.flops, self.train_seconds)

    def _utilization(self, flops: float, seconds: float) -> float | None:
        return None if self._peak is None else _ratio(flops, seconds * self._peak * 1e12 * self._num_devices)

    def window(self) -> dict[str, float | None]:
        """Metrics for the log: throughput of the steps since the last call; progress and costs since the beginning."""
        tokens_per_second = _ratio(self._window_tokens, self._window_seconds)
        metrics = {
            "throughput/tokens_per_second": tokens_per_second,
            "throughput/tokens_per_second_per_device": _ratio(tokens_per_second, self._num_devices),
            "throughput/model_flops_utilization": self._utilization(self._window_flops, self._window_seconds),
            "throughput/step_seconds": _ratio(self._window_seconds, self._window_steps),
            "throughput/data_wait_fraction": _ratio(self._window_data_wait, self._window_seconds),
            "cost/usd_train": self.usd_train,
            "cost/usd_total": self.usd_total,
            "cost/usd_per_million_tokens": self.usd_per_million_tokens,
            "progress/tokens": self.tokens,
            "progress/flops": self.flops,
        }
        self._open_window()
        return metrics

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps: plain numbers."""
        return {"tokens": self.tokens, "flops": self.flops, "train_seconds": self.train_seconds}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint: seconds that an earlier attempt trained beyond it are in its wall time only."""
        self.tokens = int(state["tokens"])
        self.flops = float(state["flops"])
        self.train_seconds = float(state["train_seconds"])


def _ratio(value: float | None, per: float) -> float | None:
    return None if value is None or per == 0 else value / per
