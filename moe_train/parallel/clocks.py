"""When exchanges begin and end, and when a step stands still for them: on the host, or on a GPU.

On a CPU the host waits, so its clock tells. On a GPU nothing waits for the device: events are left in the streams, and
read once the device is done. There an exchange is on a stream of its own, and the stream that computes stands still
where it is told to wait for another one's event. What a GPU's host exchanges with others by itself is not timed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist

from moe_train.cost.communication import Interval


class Reading:
    """A step: its exchanges by kind, when it stood still, and its seconds."""

    def __init__(self) -> None:
        self.by_kind: dict[str, list[Interval]] = {}
        self.stalls: list[Interval] = []
        self.seconds = 0.0


class Clock(Protocol):
    device_type: str

    def begin(self) -> None:
        """A step begins."""

    def called(self, kind: str, call: Callable[[], Any], asynchronous: bool, waited_for: bool) -> Any:
        """What `call` returns, a collective operation's result with its work last, timed.

        waited_for: if it is asynchronous, `standing_still` will say when it is waited for; else `waited` will.
        """

    def standing_still(self) -> AbstractContextManager[None]:
        """Within, an exchange is waited for."""

    def waited(self) -> None:
        """Since the last asynchronous exchange began, of those not waited for, there was nothing else to do."""

    def end(self) -> None:
        """The step ends."""

    def read(self) -> Reading:
        """The step that has ended. On a GPU, once it is done."""


class HostClock:
    device_type = "cpu"

    def begin(self) -> None:
        self._exchanges: list[tuple[str, list[float]]] = []
        self._stalls: list[Interval] = []
        self._launched = 0.0
        self._began = time.perf_counter()

    def called(self, kind: str, call: Callable[[], Any], asynchronous: bool, waited_for: bool) -> Any:
        times = [time.perf_counter()]
        self._exchanges.append((kind, times))
        result = call()
        work = work_of(result)
        if asynchronous:
            if not waited_for:
                self._launched = time.perf_counter()
            work.get_future().add_done_callback(lambda _: times.append(time.perf_counter()))
        else:
            work.wait()
            times.append(time.perf_counter())
            self._stalls.append((times[0], times[1]))
        return result

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._stalls.append((began, time.perf_counter()))

    def waited(self) -> None:
        if self._launched:
            self._stalls.append((self._launched, time.perf_counter()))
            self._launched = 0.0

    def end(self) -> None:
        self._ended = time.perf_counter()

    def read(self) -> Reading:
        reading = Reading()
        for kind, (start, *end) in self._exchanges:
            reading.by_kind.setdefault(kind, []).append((start, end[0] if end else self._ended))
        reading.stalls, reading.seconds = self._stalls, self._ended - self._began
        return reading


class DeviceClock:
    """Not measured: written for NCCL, on which nothing of this has been run."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._beside = torch.cuda.Stream()  # to mark the end of what the computing stream does not wait for yet

    def begin(self) -> None:
        self._compute = torch.cuda.current_stream()
        self._exchanges: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._stalls: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._launched: torch.cuda.Event | None = None
        self._wait_event = torch.cuda.Stream.wait_event
        torch.cuda.Stream.wait_event = self._noting_stalls()  # type: ignore[assignment,method-assign]
        self._began = _mark()

    def _noting_stalls(self) -> Callable[[torch.cuda.Stream, torch.cuda.Event], None]:
        """FSDP2 lets the computing stream wait by this method."""

        def wait_event(stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
            if stream != self._compute:
                self._wait_event(stream, event)
                return
            before = _mark(stream)
            self._wait_event(stream, event)
            self._stalls.append((before, _mark(stream)))

        return wait_event

    def called(self, kind: str, call: Callable[[], Any], asynchronous: bool, waited_for: bool) -> Any:
        start = _mark()
        result = call()
        if asynchronous:
            if not waited_for:
                self._launched = _mark(self._compute)
            with torch.cuda.stream(self._beside):
                work_of(result).get_future().wait()  # the stream does; the host goes on
                end = _mark()
        else:
            end = _mark()
            if torch.cuda.current_stream() == self._compute:
                self._stalls.append((start, end))
        self._exchanges.append((kind, start, end))
        return result

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        before = _mark()
        yield
        self._stalls.append((before, _mark()))

    def waited(self) -> None:
        if self._launched is not None:
            self._stalls.append((self._launched, _mark(self._compute)))
            self._launched = None

    def end(self) -> None:
        self._ended = _mark()
        torch.cuda.Stream.wait_event = self._wait_event  # type: ignore[method-assign]

    def read(self) -> Reading:
        reading = Reading()

        def seconds(event: torch.cuda.Event) -> float:
            return float(self._began.elapsed_time(event)) / 1000

        for kind, start, end in self._exchanges:
            reading.by_kind.setdefault(kind, []).append((seconds(start), seconds(end)))
        reading.stalls = [(seconds(start), seconds(end)) for start, end in self._stalls]
        reading.seconds = seconds(self._ended)
        return reading


def _mark(stream: torch.cuda.Stream | None = None) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


def work_of(result: Any) -> dist.Work:
    return dist.Work.unbox(result[-1] if isinstance(result, tuple) else result)
