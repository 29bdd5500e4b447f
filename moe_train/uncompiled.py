"""What torch loads torch.compile for at its first call, to be left out of it: optimizers and custom operators.

Loading it is 0.8 s of a start on two cores, and runs compile nothing. So each is told that it is left out already, in
the attribute where torch notes that after having loaded the compiler. If somebody does load it, that is taken back and
torch sees to it: an operator that runs below a compiled step would be traced, and tensors freed that C still reads.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef
from torch.optim import Optimizer

_COMPILER, _NOTE = "torch._dynamo", "__dynamo_disable"


class _UntilItIsLoaded(MetaPathFinder):
    """Sees the compiler being imported, and finds nothing."""

    def __init__(self) -> None:
        self.told: list[Callable[..., Any]] = []

    def find_spec(self, name: str, *_: object) -> None:
        if name == _COMPILER:
            for function in self.told:
                vars(function).pop(_NOTE, None)
            self.told.clear()


_until_it_is_loaded = _UntilItIsLoaded()
sys.meta_path.insert(0, _until_it_is_loaded)


def _is_left_out(function: Callable[..., Any]) -> None:
    innermost = inspect.unwrap(function)
    if _COMPILER not in sys.modules and _NOTE not in vars(innermost):
        setattr(innermost, _NOTE, innermost)
        _until_it_is_loaded.told.append(innermost)


def operator(name: str) -> Callable[[Callable[..., object]], CustomOpDef]:
    """`torch.library.custom_op` of a function that writes to none of its arguments."""

    def made(function: Callable[..., object]) -> CustomOpDef:
        definition = torch.library.custom_op(name, function, mutates_args=())
        for kernel in definition._backend_fns.values():
            _is_left_out(kernel)
        return definition

    return made


class AdamW(torch.optim.AdamW):
    """torch's own, to the bit."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def leave_optimizers_out() -> None:
    """Before the first optimizer is built."""
    for method in (Optimizer.add_param_group, Optimizer.load_state_dict, Optimizer.state_dict, Optimizer.zero_grad):
        _is_left_out(method)
