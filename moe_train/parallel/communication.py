"""Everything that a process of a run exchanges with others, seen where it happens.

All of it goes through the operators of torch's library `c10d`, whoever calls: this package, fully_shard, DDP in C++,
accelerate. Each is given a kernel in front of its own, which counts and calls on. It changes nothing in what is
computed. A run of one process has none of this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from moe_train.cost.communication import Exchanged
from moe_train.parallel.clocks import Clock, DeviceClock, HostClock
from moe_train.parallel.collectives import COLLECTIVES, sent_bytes

# Not a thread's own: on a GPU the backward pass runs in others.
_label: str | None = None
_waited_for = False
_in_backward = False
_current: Communication | None = None
_kernels: torch.library.Library | None = None


class Communication:
    """Of this process, from now on; of several the newest counts. Exchanges are timed in the steps that say so."""

    def __init__(self, device_type: str) -> None:
        global _current
        _current = self
        self._clock: Clock = DeviceClock() if device_type == "cuda" else HostClock()
        self._apart: set[str] = set()
        self._in_step = self._timing = False
        self._unread = False  # a timed step whose clock has not been read
        self._sums = Exchanged.nothing()
        _put_kernels_in_front()

    def apart(self, group: dist.ProcessGroup) -> None:
        """What `group` exchanges is no part of a step, even during one: a thread's that writes a checkpoint."""
        self._apart.add(group.group_name)

    @contextlib.contextmanager
    def step(self, timed: bool) -> Iterator[None]:
        """One training step."""
        self._read_clock()
        self._in_step, self._timing = True, timed
        if timed:
            self._clock.begin()
        try:
            yield
        finally:
            if timed:
                self._clock.end()
                self._unread = True
            self._in_step = self._timing = False
            self._sums.steps += 1

    def waited(self) -> None:
        """Since the last asynchronous exchange that `wait_for` does not wait for, there was nothing else to do."""
        if self._timing:
            self._clock.waited()

    def take(self) -> Exchanged:
        """What was exchanged since the last call. On a GPU, once the device is done with the last step."""
        self._read_clock()
        taken, self._sums = self._sums, Exchanged.nothing()
        return taken

    def _read_clock(self) -> None:
        if self._unread:
            self._unread = False
            reading = self._clock.read()
            self._sums.add_times(reading.by_kind, reading.stalls, reading.seconds)

    def called(self, name: str, device_type: str, arguments: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        """What `call` returns: the operation `name` of c10d with these arguments."""
        boxed = next(each for each in arguments if isinstance(each, torch.ScriptObject))
        group = dist.ProcessGroup.unbox(boxed)
        sent = sent_bytes(name, arguments, group.size(), group.rank())
        if not self._in_step or group.group_name in self._apart:
            self._sums.sent_outside += sent
            return call()
        kind = _label or ("gradients" if _in_backward and name == "allreduce_" else COLLECTIVES[name].kind)
        self._sums.sent[kind] += sent
        if self._timing and device_type == self._clock.device_type:
            asynchronous = not any(each is False for each in arguments)
            return self._clock.called(kind, call, asynchronous, waited_for=_waited_for)
        return call()

    def wait_for(self, work: dist.Work) -> None:
        with self._clock.standing_still() if self._timing else contextlib.nullcontext():
            work.wait()


@contextlib.contextmanager
def labelled(kind: str, *, waited_for: bool = False) -> Iterator[None]:
    """What is exchanged in here is of this kind; what is asynchronous, `wait_for` waits for."""
    global _label, _waited_for
    before, (_label, _waited_for) = (_label, _waited_for), (kind, waited_for)
    try:
        yield
    finally:
        _label, _waited_for = before


def wait_for(work: dist.Work) -> None:
    """Stand still until an asynchronous exchange is done; on a GPU the computing stream does, and the host goes on."""
    if _current is None:
        work.wait()
    else:
        _current.wait_for(work)


@contextlib.contextmanager
def backward() -> Iterator[None]:
    """A backward pass: what is summed in here without a label are gradients. It ends once they are complete."""
    global _in_backward
    _in_backward = True
    try:
        yield
    finally:
        _in_backward = False
    if _current is not None:
        _current.waited()  # DDP sums some while it computes others; after the last has left it can only wait


def _put_kernels_in_front() -> None:
    """Of the operators' own, once a process: where autograd's would be, since these have none."""
    global _kernels
    if _kernels is not None:
        return
    _kernels = torch.library.Library("c10d", "IMPL")
    for name in COLLECTIVES:
        for key, device_type in (("AutogradCPU", "cpu"), ("AutogradCUDA", "cuda")):
            _kernels.impl(name, _kernel(name, device_type), key, with_keyset=True)


def _kernel(name: str, device_type: str) -> Callable[..., Any]:
    operator = getattr(torch.ops.c10d, name).default
    below = torch._C._after_autograd_keyset

    def kernel(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        def call() -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keys & below, *arguments)

        return call() if _current is None else _current.called(name, device_type, arguments, call)

    return kernel
