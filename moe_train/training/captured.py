"""The passes of a step as one CUDA graph.

A small model's kernels take microseconds and launching one from Python about ten: at 16K tokens a step the GPU waits
for the host most of the time. The first step runs as it is written, which loads and compiles what there is to load; the
second is captured and every one after is replayed: the same kernels on the same memory, so the same numbers.

What a graph was made for is its key; another key (a batch that grows, a module that left FP8) begins again. Between
steps the graph keeps its memory, as PyTorch's allocator would.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from moe_train.errors import UserError, one_line

Sums = TypeVar("Sums")
Passes = Callable[[Tensor, Tensor], Sums]  # inputs, targets → what is read of them; leaves gradients


class _Graph(NamedTuple, Generic[Sums]):
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    targets: Tensor
    sums: Sums
    gradients: list[tuple[nn.Parameter, Tensor | None]]


class CapturedPasses(Generic[Sums]):
    """`passes` over `parameters`, whose gradients are none before each call."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._key: Hashable = None
        self._made: _Graph[Sums] | None = None

    def __call__(self, key: Hashable, passes: Passes[Sums], inputs: Tensor, targets: Tensor) -> Sums:
        """What passes(inputs, targets) returns; good until the next call. Raises UserError where there is no graph."""
        key = (key, inputs.shape)
        if key != self._key:
            self._key, self._made = key, None
            return passes(inputs, targets)
        if self._made is None:
            self._made = self._captured(passes, inputs, targets)
        made = self._made
        made.inputs.copy_(inputs)
        made.targets.copy_(targets)
        for parameter, gradient in made.gradients:
            parameter.grad = gradient
        made.graph.replay()
        return made.sums

    def _captured(self, passes: Passes[Sums], inputs: Tensor, targets: Tensor) -> _Graph[Sums]:
        own = inputs.clone(), targets.clone()
        torch.cuda.synchronize(inputs.device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may load batches meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                sums = passes(*own)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(
                f"the passes of a step do not become a CUDA graph here ({one_line(error)[:200]}): use cuda_graphs=never"
            ) from error
        return _Graph(graph, *own, sums, [(parameter, parameter.grad) for parameter in self._parameters])
