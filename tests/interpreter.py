"""Triton's interpreter, without the half of its time that goes into patching Triton's language again and again.

It does so at every call of a device function (`tl.sum`, say), within a kernel for which it already has: thousands of
times a launch on a grid of hundreds. What is patched stays patched until the kernel's end, so once is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any


def patch_once() -> None:
    """From now on, in this process. Of triton 3.6 and 3.7; of one without these names nothing is changed."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch: Callable[[FunctionType], Any] | None = getattr(interpreter, "_patch_lang", None)
    scope_of: type | None = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope_of is None:
        return
    kernel: list[set[int]] = []  # the modules patched for the kernel that runs, if one does
    for_good: set[int] = set()  # those patched for a device function, which the interpreter leaves so

    def once(fn: FunctionType) -> Any:
        modules = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if kernel and modules <= kernel[-1] | for_good:
            return scope_of()
        scope = patch(fn)
        if kernel:
            for_good.update(modules)
            return scope
        kernel.append(modules)
        restore = scope.restore

        def restored() -> None:
            kernel.clear()
            restore()

        scope.restore = restored
        return scope

    interpreter._patch_lang = once
