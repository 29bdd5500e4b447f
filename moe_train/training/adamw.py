"""AdamW by the project's kernel, and AdamW whose two moments are stored in BF16 (arXiv 1711.05101).

On a GPU one kernel steps all parameters of a group and multiplies gradients by clipping's coefficient as it reads them
(kernels/adamw.py), with moments in FP32, or in BF16 with rounding to the nearest. States are those of torch's AdamW.

Elsewhere FP32 moments are torch's own matter. In BF16 (arXiv 2412.19437, section 3.3.3), which torch's fused AdamW has
not beside FP32 parameters, they are widened to FP32, updated with torch's arithmetic, used, and narrowed again, a chunk
of all parameters at a time: FP32 moments exist of a chunk alone, which is 1/32 of the optimizer's elements (but 65,536
to 16.8M). Its workspace is 8 bytes an element of the chunk, 14 where rounding is stochastic: 0.25 to 0.44 bytes a
parameter, against the 4 that BF16 saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from moe_train.cost.optimizer_memory import chunk_elements
from moe_train.training.clipping import kernels_take
from moe_train.training.moments import NEAREST, Rounding, load_states, store


class KernelAdamW(torch.optim.AdamW):
    """torch's AdamW by the project's kernel, for FP32 parameters that it takes; either loads the other's states."""

    takes_coefficient = True

    @overload
    def step(self, closure: None = None, *, coefficient: Tensor | None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float], *, coefficient: Tensor | None = None) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, coefficient: Tensor | None = None) -> float | None:
        """coefficient: what gradients are multiplied by as they are read."""
        loss = _loss_of(closure)
        for group in self.param_groups:
            _step_by_kernel(self, group, torch.float32, coefficient)
        return loss


def _loss_of(closure: Callable[[], float] | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _step_by_kernel(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], moments: torch.dtype, coefficient: Tensor | None
) -> None:
    from moe_train.kernels import adamw as kernels

    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    if not parameters:
        return
    device, rate = parameters[0].device, group["lr"]
    for parameter in parameters:
        state = optimizer.state[parameter]
        if not state:
            _begin(state, parameter, moments, device)
        # On the host where no kernel counted, and after a checkpoint is read.
        state["step"] = state["step"].to(device, torch.float32)
    kernels.step(
        parameters,
        [parameter.grad.contiguous() for parameter in parameters],
        *([optimizer.state[parameter][name] for parameter in parameters] for name in ("exp_avg", "exp_avg_sq", "step")),
        rate=rate if isinstance(rate, Tensor) else torch.full((), rate, device=device),
        betas=group["betas"],
        eps=group["eps"],
        decay=group["weight_decay"],
        coefficient=coefficient,
    )


def _begin(state: dict[str, Any], parameter: Tensor, moments: torch.dtype, counts_on: torch.device) -> None:
    """The state of a parameter before its first step."""
    state["step"] = torch.zeros((), dtype=torch.float32, device=counts_on)
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros_like(parameter, dtype=moments, memory_format=torch.contiguous_format)


class _Piece(NamedTuple):
    """Flat parts of a parameter, its gradient (both FP32) and its moments (BF16), and what a step needs to know."""

    parameter: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    correction: tuple[float, float]  # of moments that began at zero
    generator: torch.Generator | None


class BF16AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay and BF16 moments, for FP32 parameters on any device."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        rounding: Rounding = NEAREST,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.rounding = rounding
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.chunk = chunk_elements(sum(parameter.numel() for parameter in parameters))
        self.takes_coefficient = not rounding.stochastic and kernels_take(parameters)

    @overload
    def step(self, closure: None = None, *, coefficient: Tensor | None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float], *, coefficient: Tensor | None = None) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, coefficient: Tensor | None = None) -> float | None:
        """coefficient: what gradients are multiplied by as they are read, where it `takes_coefficient`."""
        assert coefficient is None or self.takes_coefficient
        loss = _loss_of(closure)
        number = 0
        for group in self.param_groups:
            if self.takes_coefficient:
                _step_by_kernel(self, group, torch.bfloat16, coefficient)
                continue
            for chunk in self._chunks(group, number):
                _update(chunk, group)
            number += len(group["params"])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        load_states(self, state_dict, torch.bfloat16)

    def _chunks(self, group: dict[str, Any], first_number: int) -> Iterator[list[_Piece]]:
        """Pieces of at most `self.chunk` elements together; only what is larger than a chunk is cut."""
        chunk: list[_Piece] = []
        room = self.chunk
        for number, parameter in enumerate(group["params"], first_number):
            if parameter.grad is None:
                continue
            for piece in self._pieces(parameter, number, group["betas"]):
                if len(piece.parameter) > room:
                    yield chunk
                    chunk, room = [], self.chunk
                chunk.append(piece)
                room -= len(piece.parameter)
        if chunk:
            yield chunk

    def _pieces(self, parameter: Tensor, number: int, betas: tuple[float, float]) -> Iterator[_Piece]:
        state = self.state[parameter]
        if not state:
            _begin(state, parameter, torch.bfloat16, torch.device("cpu"))
        state["step"] += 1
        step = int(state["step"].item())
        correction = (1 - betas[0] ** step, 1 - betas[1] ** step)
        generator = self.rounding.generator(step, number, parameter.device)
        assert parameter.grad is not None
        flat = (parameter.view(-1), parameter.grad.reshape(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1))
        for parameter_part, gradient, first, second in zip(*(each.split(self.chunk) for each in flat), strict=True):
            yield _Piece(parameter_part, gradient, first, second, correction, generator)


def _update(chunk: list[_Piece], group: dict[str, Any]) -> None:
    """One step of a chunk, in the order and with the operations of torch's AdamW."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    parameters = [piece.parameter for piece in chunk]
    gradients = [piece.gradient for piece in chunk]
    first = [piece.first.float() for piece in chunk]
    second = [piece.second.float() for piece in chunk]
    torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
    torch._foreach_lerp_(first, gradients, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
    for piece, wide_first, wide_second in zip(chunk, first, second, strict=True):
        store(wide_first, piece.first, piece.generator)
        store(wide_second, piece.second, piece.generator)
    torch._foreach_sqrt_(second)  # from here on the denominator
    torch._foreach_div_(second, [piece.correction[1] ** 0.5 for piece in chunk])
    torch._foreach_add_(second, group["eps"])
    torch._foreach_addcdiv_(parameters, first, second, [-lr / piece.correction[0] for piece in chunk])
