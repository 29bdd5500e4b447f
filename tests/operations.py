"""Which of torch's operations a piece of code calls, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Within, `see` is called after each operation with it, its arguments and its result."""

    def __init__(self, see: Callable[[OpOverload, tuple[Any, ...], Any], object]) -> None:
        super().__init__()
        self._see = see

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self._see(func, args, out)
        return out
