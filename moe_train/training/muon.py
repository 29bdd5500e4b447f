"""Muon for matrices and for experts stacked into one (E, out, in) tensor.

The momentum of each matrix is replaced by the nearest semi-orthogonal one, so that all its directions are learnt at the
same rate, rare ones too (Keller Jordan, https://kellerjordan.github.io/posts/muon/). The iteration is a handful of
matrix products; run matrix by matrix it is bound by launches, so experts, and equal shapes of different layers, go
through it as one batched product: 256 matrices of 64×128 take 31 ms instead of 125 ms in float32 on two CPU cores.
Gate and up projection, joined for the sake of the model's products, are two matrices here: each is a map of its own,
and 11 million multiplications do instead of 26 for each iteration of an expert of 96 × 256.
torch.optim.Muon takes 2-D parameters only.

The iteration mixes all entries of a matrix, so matrices that are cut over processes are made whole for it, and those
that several processes have alike are shared out where that is faster (parallel/whole_matrices.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor

from moe_train.cost.optimizer_memory import MUON_BATCH_ELEMENTS, chunk_elements
from moe_train.kernels.cpu import muon as compiled
from moe_train.parallel.whole_matrices import Copies, WholeMatrices
from moe_train.precision.support import multiplies_bfloat16
from moe_train.training.clipping import kernels_take
from moe_train.training.moments import NEAREST, Rounding, load_states, store

# A quintic whose slope at 0 is as steep as it can be; singular values end within about 0.7 to 1.2, not at 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_EPS = 1e-7
_TOGETHER = 2**22  # numbers of batches whose directions are there at once, 8 MB


def fast_dtype(device: torch.device) -> torch.dtype:
    """BF16 where the device multiplies it faster; its precision is enough for this iteration.

    On a CPU with AVX512-BF16 it takes about half the time (190 against 390 ms for 16 matrices of 512×512).
    """
    return torch.bfloat16 if multiplies_bfloat16(device.type) else torch.float32


def orthogonalized(x: Tensor, steps: int) -> Tensor:
    """Approximately U V^T for x = U S V^T, for each matrix of x (N, out, in), by Newton-Schulz in x's dtype."""
    tall = x.size(-2) > x.size(-1)
    if tall:  # the Gram matrix is then the small one
        x = x.mT
    # The Frobenius norm is at least the spectral one: all singular values start within [0, 1]. Summed in float32.
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = x / norm.clamp(min=_EPS).to(x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay; parameters are (out, in) or (E, out, in), each expert a matrix of its own.

    The update is scaled by 0.2·sqrt(max(out, in)), which gives it the root mean square of AdamW's, so that AdamW's
    learning rate and weight decay carry over (arXiv 2502.16982, section 2.2). `momentum_dtype`: what the momentum is
    stored in, FP32 or BF16; in BF16, `rounding` says how. It is updated and used in FP32 either way. `whole`: knows the
    parameters that are a process's rows of a matrix. `copies`: those that other processes have too, to be shared out.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        weight_decay: float,
        momentum_dtype: torch.dtype = torch.float32,
        rounding: Rounding = NEAREST,
        joined: Collection[Tensor] = (),
        whole: WholeMatrices | None = None,
        copies: Copies | None = None,
    ) -> None:
        """joined: those whose rows are two matrices, one above the other."""
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})
        self.momentum_dtype, self.rounding, self.whole = momentum_dtype, rounding, whole
        self.copies = copies
        self._joined = {id(parameter) for parameter in joined}
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.numbers = {parameter: number for number, parameter in enumerate(parameters)}
        self.chunk = chunk_elements(sum(parameter.numel() for parameter in parameters))
        apart = whole is not None or copies is not None
        self.takes_coefficient = not apart and momentum_dtype == torch.float32 and kernels_take(parameters)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim not in (2, 3):
                    raise ValueError(f"Muon takes matrices and stacks of matrices, not a {tuple(parameter.shape)}")

    @overload
    def step(self, closure: None = None, *, coefficient: Tensor | None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float], *, coefficient: Tensor | None = None) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, coefficient: Tensor | None = None) -> float | None:
        """coefficient: what gradients are multiplied by as they are read, where it `takes_coefficient`."""
        assert coefficient is None or self.takes_coefficient
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if self.takes_coefficient:
                for together in self._rounds(group["params"]):
                    self._step_by_kernels(together, group, coefficient)
                continue
            for batch in self._batches(group["params"]):
                if not self._step_compiled(batch, group):
                    self._step_batch(batch, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        load_states(self, state_dict, self.momentum_dtype)

    def _step_batch(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One step of parameters whose matrices have one shape."""
        directions = [self._direction(parameter, group) for parameter in parameters]
        shape, steps, pieces = self.matrix_shape(parameters[0]), group["ns_steps"], torch.cat(directions)

        def iterated(stacks: Tensor) -> Tensor:
            count = stacks.shape[0] * stacks.shape[1] // shape[0]
            return orthogonalized(stacks.reshape(count, *shape), steps).reshape(stacks.shape)

        if self.whole is not None and parameters[0] in self.whole:
            updates = self.whole.done_whole(iterated, pieces, rows=self.whole.shapes[parameters[0]][0])
        elif self.copies is not None:
            group_of_copies = self.copies.groups.get(parameters[0])
            updates = self.copies.done_once(lambda some: orthogonalized(some, steps), pieces, group_of_copies)
        else:
            updates = orthogonalized(pieces, steps)
        scale, rate = 0.2 * math.sqrt(max(shape)), group["lr"]
        for parameter, update in zip(parameters, torch.split(updates, [len(d) for d in directions]), strict=True):
            parameter.mul_(1 - rate * group["weight_decay"])
            if isinstance(rate, Tensor):  # on the device, where a CUDA graph reads it
                parameter.addcmul_(update.reshape(parameter.shape).to(parameter.dtype), rate * -scale)
            else:
                parameter.add_(update.reshape(parameter.shape), alpha=-rate * scale)

    def _step_compiled(self, parameters: list[Tensor], group: dict[str, Any]) -> bool:
        """The same by kernels/cpu, if that takes them."""
        cut = self.whole is not None and parameters[0] in self.whole
        if self.momentum_dtype != torch.float32 or cut or self.copies is not None:
            return False
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        shape, momenta = self.matrix_shape(parameters[0]), [self._momentum(parameter) for parameter in parameters]
        if not compiled.takes([*parameters, *gradients, *momenta], shape):
            return False
        learn, decay = group["lr"] * 0.2 * math.sqrt(max(shape)), 1 - group["lr"] * group["weight_decay"]
        how = compiled.Step(group["momentum"], group["nesterov"], group["ns_steps"], learn, decay)
        compiled.step(parameters, gradients, momenta, shape, how)
        return True

    def _step_by_kernels(self, batches: list[list[Tensor]], group: dict[str, Any], coefficient: Tensor | None) -> None:
        """The same on a GPU, where what is beside the products takes two kernels, and small matrices one for all."""
        from moe_train.kernels import newton_schulz
        from moe_train.kernels.muon import Matrices

        parameters = [parameter for batch in batches for parameter in batch]
        device, rate, steps = parameters[0].device, group["lr"], group["ns_steps"]
        if not isinstance(rate, Tensor):
            rate = torch.full((), rate, device=device)
        stacks, end = [], 0
        for batch in batches:
            rows, columns = self.matrix_shape(batch[0])
            count = sum(parameter.numel() for parameter in batch) // (rows * columns)
            stacks.append(newton_schulz.Stack(end, count, rows, columns))
            end = stacks[-1].end
        directions = torch.empty(end, dtype=fast_dtype(device), device=device)
        gradients = [parameter.grad.contiguous() for parameter in parameters if parameter.grad is not None]
        momenta = [self._momentum(parameter) for parameter in parameters]
        scales = [0.2 * math.sqrt(max(self.matrix_shape(parameter))) for parameter in parameters]
        matrices = Matrices.of(parameters, gradients, momenta, scales)
        matrices.direct(directions, group["momentum"], group["nesterov"], coefficient)
        small = [stack for stack in stacks if newton_schulz.takes(directions, stack.rows, stack.columns)]
        newton_schulz.orthogonalize_(directions, small, steps, (_A, _B, _C), _EPS)
        for stack in stacks:
            if stack not in small:
                part = directions[stack.first : stack.end].view(-1, stack.rows, stack.columns)
                part.copy_(orthogonalized(part, steps))
        matrices.update(directions, rate, group["weight_decay"])

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            assert parameter.grad is not None
            state["momentum_buffer"] = torch.zeros_like(
                parameter.grad, dtype=self.momentum_dtype, memory_format=torch.contiguous_format
            )
        momentum: Tensor = state["momentum_buffer"]
        return momentum

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Momentum as (N, out, in), in the dtype the iteration runs in."""
        gradient = parameter.grad
        assert gradient is not None
        momentum = self._momentum(parameter)
        if self.momentum_dtype == torch.float32:
            momentum.lerp_(gradient, 1 - group["momentum"])
            direction = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
            direction = direction.to(fast_dtype(parameter.device))
        else:
            direction = self._through_float32(parameter, gradient, self.state[parameter], group)
        if self.whole is not None and parameter in self.whole:
            return direction.reshape(1, *parameter.shape)
        rows, columns = self.matrix_shape(parameter)
        count = (len(parameter) if parameter.ndim == 3 else 1) * (parameter.shape[-2] // rows)
        return direction.reshape(count, rows, columns)

    def _through_float32(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> Tensor:
        """Direction (numel,) of a momentum that is wider only while its chunk is updated.

        Workspace a number of the chunk: 8 bytes with Nesterov's direction, 10 where rounding is stochastic.
        """
        state["step"] = state.get("step", torch.tensor(0.0)) + 1  # what random numbers are drawn for
        number = self.numbers[parameter]
        generator = self.rounding.generator(int(state["step"].item()), number, parameter.device)
        direction = torch.empty(parameter.numel(), dtype=fast_dtype(parameter.device), device=parameter.device)
        flat = (gradient.reshape(-1), state["momentum_buffer"].view(-1), direction)
        for grad, narrow, out in zip(*(each.split(self.chunk) for each in flat), strict=True):
            momentum = narrow.float().lerp_(grad, 1 - group["momentum"])
            store(momentum, narrow, generator)
            out.copy_(grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum)
        return direction

    def matrix_shape(self, parameter: Tensor) -> tuple[int, int]:
        """Rows and columns of each of its matrices."""
        rows, columns = self._shape(parameter)[-2:]
        return (rows // 2 if id(parameter) in self._joined else rows), columns

    def _shape(self, parameter: Tensor) -> torch.Size:
        """Of all of it, where a process has rows."""
        return self.whole.shapes[parameter] if self.whole is not None and parameter in self.whole else parameter.shape

    def _rounds(self, parameters: list[Tensor]) -> Iterator[list[list[Tensor]]]:
        """Batches that share launches: small ones."""
        together: list[list[Tensor]] = []
        numbers = 0
        for batch in self._batches(parameters):
            size = sum(parameter.numel() for parameter in batch)
            if together and numbers + size > _TOGETHER:
                yield together
                together, numbers = [], 0
            together.append(batch)
            numbers += size
        if together:
            yield together

    def _batches(self, parameters: list[Tensor]) -> Iterator[list[Tensor]]:
        """Parameters with gradients, those of equal matrix shape together, up to `MUON_BATCH_ELEMENTS` a process.

        What is cut is apart from what is not, and copies by who has them; batches are the same on all processes.
        """
        by_shape: dict[tuple[torch.device, bool, tuple[Any, ...]], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            if parameter.grad is not None:
                cut = self.whole is not None and parameter in self.whole
                others = None if self.copies is None else self.copies.groups.get(parameter)
                alike_in = (*self.matrix_shape(parameter), others, *(self._shape(parameter) if cut else ()))
                by_shape[parameter.device, cut, alike_in].append(parameter)
        for (device, cut, _), alike in by_shape.items():
            batch: list[Tensor] = []
            most = MUON_BATCH_ELEMENTS["cuda" if device.type == "cuda" else "cpu"]
            most *= self.whole.parts if self.whole is not None and cut else 1
            for parameter in alike:
                if batch and sum(self._shape(p).numel() for p in [*batch, parameter]) > most:
                    yield batch
                    batch = []
                batch.append(parameter)
            yield batch
