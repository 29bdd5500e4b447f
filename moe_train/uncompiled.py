"""What torch loads torch.compile for at its first call, to be left out of it: optimizers and custom operators.

Loading it is 0.8 s of a start on two cores. Runs compile nothing; where somebody compiles a model of ours, operators
are opaque to the compiler already, and no optimizer is compiled. So each is told that it is left out, in the attribute
where torch notes that after having loaded the compiler.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef
from torch.optim import Optimizer


def _is_left_out(function: Callable[..., Any]) -> None:
    innermost = inspect.unwrap(function)
    vars(innermost).setdefault("__dynamo_disable", innermost)


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
