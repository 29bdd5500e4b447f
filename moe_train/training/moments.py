"""Optimizer moments that are stored in BF16: computed in FP32, rounded when stored, the same again when loaded.

Weights and gradients stay in FP32 (DeepSeek-V3, arXiv 2412.19437, section 3.3.3). BF16 has FP32's range and 8 bits of
significand, so rounding to the nearest value drops a change of less than half a unit in the last place, which is 1/512
to 1/256 of the value. A second moment changes by (1 - beta2)(g² - v): with beta2 = 0.95 it stands still while g² is
within 4% of v (8% at most), with 0.999 while g² is anywhere from 0 to 2.95 times v (4.9 at most), so that it never
decays. Rounded up or down at random, in proportion to how near each is, it is right on average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_FRACTION_BITS = 0xFFFF  # of FP32, those that BF16 lacks


@dataclass(frozen=True)
class Rounding:
    """How FP32 becomes BF16: to the nearest value (ties to even), or at random.

    Random numbers are a function of (seed, stream, step, parameter, part), so a resumed run needs no saved random state
    and torch's own is left alone. `stream` tells the optimizers of one run apart, `part` the processes that have
    different parts of a parameter. All that have the same draw the same.
    """

    stochastic: bool = False
    seed: int = 0
    stream: int = 0
    part: int = 0

    def generator(self, step: int, parameter: int, device: torch.device) -> torch.Generator | None:
        """Of a parameter's moments at a step, to be drawn from in order; None where nothing is drawn."""
        if not self.stochastic:
            return None
        parts = [self.part] if self.part else []
        key = np.random.SeedSequence([self.seed, self.stream, step, parameter, *parts]).generate_state(1, np.uint64)[0]
        return torch.Generator(device).manual_seed(int(key >> np.uint64(1)))


NEAREST = Rounding()


def store(wide: Tensor, narrow: Tensor, generator: torch.Generator | None) -> None:
    """Write `wide` (FP32) into `narrow` (BF16, same shape), at random with a generator, else the nearest value."""
    narrow.copy_(wide if generator is None else stochastically_rounded(wide, generator))


def stochastically_rounded(wide: Tensor, generator: torch.Generator) -> Tensor:
    """`wide` (n,) in FP32, each number replaced by the BF16 value above or below it.

    Adding a random number of 16 bits to the bits that BF16 lacks carries into the others in proportion to them. Values
    of BF16, infinities and NaN stay; above the largest finite value lies infinity. Takes 6 bytes a number at its most.
    """
    # Four random numbers a draw: generators of CPUs are the slowest part of this.
    words = torch.empty(-(-len(wide) // 4), dtype=torch.int64, device=wide.device)
    words.random_(-(2**63), None, generator=generator)
    bits = words.view(torch.int16)[: len(wide)].to(torch.int32).bitwise_and_(_FRACTION_BITS)
    del words
    rounded = bits.add_(wide.view(torch.int32)).bitwise_and_(~_FRACTION_BITS).view(torch.float32)
    return rounded.masked_fill_(wide.isnan(), torch.nan)  # the carry would make zero of CUDA's NaN


def load_states(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], dtype: torch.dtype) -> None:
    """`load_state_dict` that leaves moments in the format they were saved in, which must be `dtype`.

    torch's own casts them to the parameter's. Raises ValueError for another optimizer's states.
    """
    torch.optim.Optimizer.load_state_dict(optimizer, {"state": {}, "param_groups": state_dict["param_groups"]})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for name, value in state_dict["state"].get(number, {}).items():
            if value.ndim and (value.dtype != dtype or value.shape != parameter.shape):
                raise ValueError(f"its {name} is {tuple(value.shape)} in {value.dtype}, not in {dtype}")
            # A step counter, a single number, is read by the host.
            optimizer.state[parameter][name] = value.to(parameter.device) if value.ndim else value
