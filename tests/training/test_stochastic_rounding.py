"""FP32 to BF16 at random: right on average, a function of its key alone; and where the nearest value stands still."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moe_train.training.adamw import BF16AdamW
from moe_train.training.moments import Rounding, stochastically_rounded


def bits(wide: Tensor) -> Tensor:
    return wide.contiguous().view(torch.int32)


def draw(stream: int = 0) -> torch.Generator:
    generator = Rounding(True, 0, stream).generator(1, 0, torch.device("cpu"))
    assert generator is not None
    return generator


@settings(deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 2**31))
def test_a_number_becomes_one_of_its_two_neighbours_and_those_of_bf16_stay(number: float, stream: int) -> None:
    wide = torch.full((9,), number)
    rounded = stochastically_rounded(wide, draw(stream))
    below = bits(wide) & ~0xFFFF  # towards zero; the other neighbour is away from it
    assert torch.isin(bits(rounded), torch.stack([below, below + 0x10000])).all()
    exact = wide.bfloat16().float()
    assert torch.equal(bits(stochastically_rounded(exact, draw(stream))), bits(exact))


@pytest.mark.parametrize("number", [1.0 + 2**-9, -(1.0 + 2**-8 - 2**-12), 3e-39, 1e30])
def test_rounding_at_random_is_right_on_average(number: float) -> None:
    """The mean of 2^18 draws is within 5 standard deviations of a coin that falls in proportion to the distance."""
    draws = 2**18
    wide = torch.full((draws,), number)
    share = (bits(wide)[0] & 0xFFFF).item() / 2**16  # how far up the neighbours
    away = (bits(stochastically_rounded(wide, draw())) != (bits(wide) & ~0xFFFF)).double().mean().item()
    assert abs(away - share) < 5 * math.sqrt(share * (1 - share) / draws)


@pytest.mark.parametrize("pattern", [0x7F800000, -0x800000, 0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001])
def test_infinities_and_every_nan_stay_what_they_are(pattern: int) -> None:
    wide = torch.full((64,), pattern, dtype=torch.int32).view(torch.float32)
    torch.testing.assert_close(stochastically_rounded(wide, draw()), wide, equal_nan=True, rtol=0, atol=0)


def test_random_numbers_depend_on_seed_optimizer_step_and_parameter_alone() -> None:
    wide = torch.full((1000,), 1.0 + 2**-9)
    keys = [(0, 0, 1, 0), (1, 0, 1, 0), (0, 1, 1, 0), (0, 0, 2, 0), (0, 0, 1, 1)]
    torch.manual_seed(5)
    before = torch.get_rng_state()

    def rounded(seed: int, stream: int, step: int, parameter: int) -> Tensor:
        generator = Rounding(True, seed, stream).generator(step, parameter, wide.device)
        assert generator is not None
        return stochastically_rounded(wide, generator)

    first = [rounded(*key) for key in keys]
    assert all(torch.equal(a, rounded(*key)) for a, key in zip(first, keys, strict=True))
    for one, a in enumerate(first):
        assert not any(torch.equal(a, b) for b in first[:one])
    assert torch.equal(torch.get_rng_state(), before)


def decayed(rounding: Rounding, steps: int) -> float:
    """Of a second moment of 1 in 4,096 places, the mean after `steps` of gradients of zero, with beta2 = 0.999."""
    parameter = nn.Parameter(torch.zeros(4096))
    optimizer = BF16AdamW([parameter], lr=0.0, betas=(0.9, 0.999), eps=1e-8, rounding=rounding)
    parameter.grad = torch.zeros(4096)
    optimizer.step()
    optimizer.state[parameter]["exp_avg_sq"].fill_(1.0)
    for _ in range(steps):
        optimizer.step()
    return float(optimizer.state[parameter]["exp_avg_sq"].double().mean())


def test_with_beta2_of_0_999_the_nearest_second_moment_stands_still_and_the_random_one_decays() -> None:
    assert decayed(Rounding(), 200) == 1.0
    assert decayed(Rounding(stochastic=True), 200) == pytest.approx(0.999**200, rel=0.01)
