"""Where a step waits for the device: every place at which the host reads a tensor's values, counted on any device.

Counted are the operations that cannot return before the device has caught up: reading a scalar (`.item()`,
`if tensor`, `.tolist()`, copies to the CPU) and results whose shape depends on values (`nonzero`, boolean masks,
`unique`, `repeat_interleave` without an output size). On a CPU nothing waits, but the same code would on a GPU, so the
count of a CPU holds for all machines. Code for the CPU alone (files named cpu_…) is told apart. On CUDA the backward
pass runs on threads that are not watched: there torch's own debug mode counts as well.
"""

from __future__ import annotations

import contextlib
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACKAGE = Path(__file__).resolve().parents[1]
_THIS = Path(__file__).resolve()
_TORCH = Path(torch.__file__).resolve().parent

_OF_VALUES = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_COPIES = {"aten::_to_copy", "aten::copy_"}


class HostReads:
    """Reads by place (`file.py:function`) while it is entered: with HostReads() as reads: … reads.places"""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self._modes = contextlib.ExitStack()

    def __enter__(self) -> HostReads:
        self._modes.enter_context(_Functions(self))
        self._modes.enter_context(_Operations(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._modes.close()

    def note(self) -> None:
        """One more, at the innermost frame of the package, or of whoever called torch from outside of it."""
        place: types.FrameType | None = None
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if file.is_relative_to(PACKAGE) and file != _THIS:
                place = frame
                break
            if place is None and file != _THIS and not file.is_relative_to(_TORCH):
                place = frame
            frame = frame.f_back
        if place is not None:
            self.places[f"{Path(place.f_code.co_filename).name}:{place.f_code.co_name}"] += 1

    @property
    def everywhere(self) -> dict[str, int]:
        """Those of code that also runs on a GPU."""
        return {place: count for place, count in self.places.items() if not place.startswith("cpu_")}

    @property
    def on_cpu_only(self) -> dict[str, int]:
        return {place: count for place, count in self.places.items() if place.startswith("cpu_")}


class _Functions(TorchFunctionMode):
    """What reads memory without dispatching an operation on a CPU."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.tolist, Tensor.numpy) and args[0].device.type == "cpu":  # elsewhere a copy comes first
            self.reads.note()
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads = reads

    def __torch_dispatch__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if _reads_values(func, args, kwargs or {}, result):
            self.reads.note()
        return result


def _reads_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
    name = func._schema.name
    if name in _OF_VALUES:
        return True
    if name in _INDEXING:
        return any(
            isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1])
        )
    if name == "aten::repeat_interleave" and isinstance(args[-1], Tensor):
        return kwargs.get("output_size") is None
    if name in _COPIES:
        source = args[1] if name == "aten::copy_" else args[0]
        waits = not (kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2]))
        return bool(source.device.type != "cpu" and result.device.type == "cpu" and waits)
    return False


def waits_of_cuda(step: Callable[[], object]) -> int:
    """How often torch's CUDA functions waited for the device during `step`."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)
