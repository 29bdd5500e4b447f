"""A training step, or its passes, as one CUDA graph.

A small model's kernels take microseconds and launching one from Python about ten: at 16K tokens a step the GPU waits
for the host most of the time. The first call runs as it is written, which loads and compiles what there is to load; the
second is captured and every one after is replayed: the same kernels on the same memory, so the same numbers.

What a graph was made for is its key; another key (a batch that grows, a module that left FP8) begins again. Between
calls a graph keeps its memory; those of one process share it, as they never run at the same time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from moe_train.errors import UserError, one_line

Result = TypeVar("Result")
Function = Callable[[Tensor, Tensor], Result]  # of inputs and targets; waits for nothing


class _Graph(NamedTuple, Generic[Result]):
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    targets: Tensor
    result: Result
    gradients: list[tuple[nn.Parameter, Tensor | None]]


class Captured(Generic[Result]):
    """Calls of one function. Gradients of `parameters` are none before each and what the function left after."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._key: Hashable = None
        self._made: _Graph[Result] | None = None

    def __call__(self, key: Hashable, function: Function[Result], inputs: Tensor, targets: Tensor) -> Result:
        """function(inputs, targets); what it returns is good until the next call. Raises UserError."""
        key = (key, inputs.shape)
        if key != self._key:
            self._key, self._made = key, None
            return function(inputs, targets)
        if self._made is None:
            self._made = self._captured(function, inputs, targets)
        made = self._made
        made.inputs.copy_(inputs)
        made.targets.copy_(targets)
        made.graph.replay()
        for parameter, gradient in made.gradients:
            parameter.grad = gradient
        return made.result

    def _captured(self, function: Function[Result], inputs: Tensor, targets: Tensor) -> _Graph[Result]:
        own = inputs.clone(), targets.clone()
        torch.cuda.synchronize(inputs.device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may load batches meanwhile.
            with torch.cuda.graph(graph, pool=_shared_pool(), capture_error_mode="thread_local"):
                result = function(*own)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(
                f"a step does not become a CUDA graph here ({one_line(error)[:200]}): use cuda_graphs=never"
            ) from error
        _graphs.add(graph)
        return _Graph(graph, *own, result, [(parameter, parameter.grad) for parameter in self._parameters])


_graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()


def _shared_pool() -> Any:
    """The memory of the graphs there are; a pool ends with its last graph."""
    for graph in _graphs:
        return graph.pool()
    return None


class RatesOnDevice:
    """Learning rates of optimizers as numbers on the device, which a graph reads anew in every replay."""

    def __init__(self, optimizers: list[torch.optim.Optimizer], device: torch.device) -> None:
        self._optimizers = optimizers
        self._rates = [torch.zeros((), device=device) for _ in self._groups]

    @property
    def _groups(self) -> list[dict[str, Any]]:
        """Asked for anew, as reading a checkpoint replaces them."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def update(self) -> None:
        """From the groups, which keep plain numbers: checkpoints hold those."""
        for rate, group in zip(self._rates, self._groups, strict=True):
            rate.fill_(group["lr"])

    @contextlib.contextmanager
    def given(self) -> Iterator[None]:
        """Within, the groups have them."""
        plain: list[dict[str, Any]] = [
            {key: group[key] for key in ("lr", "capturable") if key in group} for group in self._groups
        ]
        try:
            for rate, group in zip(self._rates, self._groups, strict=True):
                group["lr"], group["capturable"] = rate, True
            yield
        finally:
            for own, group in zip(plain, self._groups, strict=True):
                group.pop("capturable")
                group.update(own)
