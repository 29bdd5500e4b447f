"""How many bytes of tensors live at once, counted on any device as torch.cuda.max_memory_allocated counts on CUDA.

A CPU's allocator keeps no such figure, so every operation is looked at as it is dispatched, those of the backward pass
and of optimizers among them, and every storage is counted from its creation until it is freed. The project's own
operators are looked into. Left out is what kernels allocate for themselves without making a tensor that torch
dispatches: oneDNN's copies of weights, chunks of the fused attention, a reduction's buffers. Operations run on another
thread are not seen: on a CPU the backward pass runs on the caller's, on CUDA it does not, and
torch.cuda.max_memory_allocated is there the better meter.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The caching allocator of CUDA hands out multiples of this, so that the figures can be compared.
ALLOCATION = 512


# Operations that make a tensor as large as their input within themselves: exponentials, before they are summed.
_COPYING = (torch.ops.aten.logsumexp.default,)
_ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class TensorPeak(TorchDispatchMode):
    """Counts the storages that are alive while it is entered; `held` are those that exist already.

    with TensorPeak(model.parameters()) as meter:
        ...
    meter.peak
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0  # alive now
        self.peak = 0  # the most since `reset`
        self._sizes: dict[weakref.ref[torch.UntypedStorage], int] = {}
        for tensor in held:
            self._count(tensor)

    def reset(self) -> None:
        """Let the peak be what is alive now."""
        self.peak = self.bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "moe_train":
            with self:  # on to its kernel, past what brought the call here
                return func.redispatch(_ON_CPU, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func in _COPYING:
            self.peak = max(self.peak, self.bytes + _allocated(args[0].nbytes))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # torch keeps a storage's Python object for as long as the storage lives, so its end is the storage's.
        reference = weakref.ref(storage, self._freed)
        if reference in self._sizes:
            return
        size = _allocated(storage.nbytes())
        self._sizes[reference] = size
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _freed(self, reference: weakref.ref[torch.UntypedStorage]) -> None:
        self.bytes -= self._sizes.pop(reference)


def _allocated(size: int) -> int:
    return -(-size // ALLOCATION) * ALLOCATION
