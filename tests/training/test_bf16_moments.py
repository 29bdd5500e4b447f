"""Moments in BF16: torch's AdamW and Muon otherwise, unbiased where rounding is random, the same after a resume."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moe_train.config import AdamWConfig, MuonConfig, OptimizerConfig, RunConfig
from moe_train.cost import optimizer_memory
from moe_train.cost.tensor_peak import TensorPeak
from moe_train.errors import UserError
from moe_train.training.adamw import BF16AdamW
from moe_train.training.checkpoints import load_optimizers, open_checkpoint, save_checkpoint
from moe_train.training.moments import Rounding
from moe_train.training.muon import Muon
from moe_train.training.optimizers import build_optimizers

ADAMW = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MUON = {"lr": 0.01, "momentum": 0.95, "nesterov": True, "ns_steps": 5, "weight_decay": 0.1}
AT_RANDOM = Rounding(stochastic=True, seed=3)
SHAPES = ((5,), (8, 16), (3, 8, 4))


def made(seed: int = 0, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(parameters: list[nn.Parameter], steps: int, seed: int = 1) -> Iterator[None]:
    """Sets random gradients, once a step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 10
        yield


def train(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int, seed: int = 1) -> None:
    for _ in gradients(parameters, steps, seed):
        optimizer.step()


# ---------------------------------------------------------------------------------------------------------- AdamW


def reference(parameters: list[nn.Parameter], steps: int) -> list[Tensor]:
    """AdamW (arXiv 1711.05101, algorithm 2) in float64, its moments rounded to the nearest BF16 after each step."""
    (beta1, beta2), lr = ADAMW["betas"], ADAMW["lr"]
    weights = [p.detach().double() for p in parameters]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    for step, _ in enumerate(gradients(copies, steps), 1):
        for n, copy in enumerate(copies):
            assert copy.grad is not None
            g = copy.grad.double()
            first[n] = beta1 * first[n] + (1 - beta1) * g
            second[n] = beta2 * second[n] + (1 - beta2) * g * g
            denominator = (second[n] / (1 - beta2**step)).sqrt() + ADAMW["eps"]
            update = first[n] / (1 - beta1**step) / denominator
            weights[n] = weights[n] - lr * update - lr * ADAMW["weight_decay"] * weights[n]
            # By way of FP32, as stored; a tie of the two roundings is rarer than these draws.
            first[n], second[n] = (m.float().bfloat16().double() for m in (first[n], second[n]))
    return weights


def test_steps_are_those_of_a_float64_reference_with_rounded_moments() -> None:
    parameters = made()
    expected = reference(parameters, 20)
    train(BF16AdamW(parameters, **ADAMW), parameters, 20)
    for parameter, weights in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), weights, rtol=0, atol=2e-6)


def test_moments_that_bf16_can_hold_give_the_bits_of_torchs_adamw() -> None:
    """With betas of 1/2 and gradients of powers of two, moments have at most a bit more each step."""
    ours, theirs = made(), made()
    exact = ADAMW | {"betas": (0.5, 0.5)}
    optimizers = BF16AdamW(ours, **exact), torch.optim.AdamW(theirs, foreach=False, fused=False, **exact)
    generator = torch.Generator().manual_seed(2)
    for _ in range(7):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.where(torch.rand(a.shape, generator=generator) < 0.5, -0.25, 0.25)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizers[0].state[a][name].float(), optimizers[1].state[b][name])


@pytest.mark.parametrize("rounding", [Rounding(), AT_RANDOM], ids=["nearest", "random"])
def test_weights_stay_near_those_of_fp32_moments(rounding: Rounding) -> None:
    ours, theirs, start = made(), made(), made()
    train(BF16AdamW(ours, rounding=rounding, **ADAMW), ours, 30)
    train(torch.optim.AdamW(theirs, **ADAMW), theirs, 30)
    for a, b, begin in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.01 * (b - begin).norm()


def test_chunks_change_nothing() -> None:
    whole, cut = made(), made()
    train(BF16AdamW(whole, **ADAMW), whole, 3)
    optimizer = BF16AdamW(cut, **ADAMW)
    optimizer.chunk = 30
    train(optimizer, cut, 3)
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # vectors and their ends may fuse differently


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "random"])
@pytest.mark.parametrize("shapes", [((600, 700),), ((100, 700),) * 30], ids=["one", "many"])
def test_the_workspace_is_that_of_a_chunk(stochastic: bool, shapes: tuple[tuple[int, ...], ...]) -> None:
    parameters = made(shapes=shapes)
    optimizer = BF16AdamW(parameters, rounding=Rounding(stochastic), **ADAMW)
    train(optimizer, parameters, 1)
    held = [t for p in parameters for t in (p, p.grad, *optimizer.state[p].values()) if t is not None]
    with TensorPeak(held) as meter:
        before = meter.bytes
        optimizer.step()
    config = AdamWConfig("adamw", 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0, "bfloat16", stochastic)
    expected = optimizer_memory.adamw_workspace(sum(p.numel() for p in parameters), config, "cpu")
    assert meter.peak - before <= expected * 1.02
    assert meter.peak - before > 0.5 * expected  # a chunk is not always full


def test_on_a_gpu_rounding_at_random_alone_has_a_workspace() -> None:
    nearest, random = (
        AdamWConfig("adamw", 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0, "bfloat16", each) for each in (False, True)
    )
    assert optimizer_memory.adamw_workspace(10**9, nearest, "cuda") == 0
    for device_type in ("cpu", "cuda"):
        assert optimizer_memory.adamw_workspace(10**9, random, device_type) == 14 * 2**24


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    parameters = made()
    optimizer = BF16AdamW(parameters, **ADAMW)
    before = parameters[1].detach().clone()
    train(optimizer, [parameters[0], parameters[2]], 2)
    assert torch.equal(parameters[1], before)
    assert parameters[1] not in optimizer.state


# ----------------------------------------------------------------------------------------------------------- Muon


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("rounding", [Rounding(), AT_RANDOM], ids=["nearest", "random"])
def test_muons_momentum_in_bf16_follows_that_in_fp32(nesterov: bool, rounding: Rounding) -> None:
    shapes = ((16, 24), (4, 16, 24))
    narrow, wide, start = made(shapes=shapes), made(shapes=shapes), made(shapes=shapes)
    chosen = MUON | {"nesterov": nesterov}
    optimizer = Muon(narrow, momentum_dtype=torch.bfloat16, rounding=rounding, **chosen)
    optimizer.chunk = 100
    train(optimizer, narrow, 10)
    train(Muon(wide, **chosen), wide, 10)
    for a, b, begin in zip(narrow, wide, start, strict=True):
        assert optimizer.state[a]["momentum_buffer"].dtype == torch.bfloat16
        assert (a - b).norm() < 0.05 * (b - begin).norm()


# --------------------------------------------------------------------------------------------- settings and resuming


def configured(kind: str, stochastic: bool) -> OptimizerConfig:
    if kind == "adamw":
        return AdamWConfig("adamw", 1e-2, (0.9, 0.95), 1e-8, 0.1, 1.0, "bfloat16", stochastic)
    return MuonConfig("muon", 1e-2, 0.95, True, 5, 0.1, 1.0, (0.9, 0.95), 1e-8, "bfloat16", stochastic)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 16), nn.RMSNorm(16), nn.Linear(16, 8)


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "random"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_checkpoint_gives_back_bf16_moments_and_the_run_goes_on_bit_for_bit(
    kind: str, stochastic: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    models = [Small(), Small()]
    straight, resumed = (build_optimizers(model, configured(kind, stochastic), seed=4) for model in models)

    def steps(which: int, optimizers: list[torch.optim.Optimizer], count: int, seed: int) -> None:
        for _ in gradients(list(models[which].parameters()), count, seed):
            for optimizer in optimizers:
                optimizer.step()

    steps(0, straight, 3, seed=1)
    path = save_checkpoint(tmp_path, models[0], straight, {"step": 3}, keep_last=1)
    models[1].load_state_dict(models[0].state_dict())
    load_optimizers(open_checkpoint(path), resumed)
    moments = [t for each in resumed for state in each.state.values() for t in state.values() if t.ndim]
    assert {t.dtype for t in moments} == {torch.bfloat16}
    steps(0, straight, 3, seed=2)
    steps(1, resumed, 3, seed=2)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    for one, other in zip(straight, resumed, strict=True):
        saved = io.BytesIO(), io.BytesIO()
        for optimizer, file in zip((one, other), saved, strict=True):
            torch.save(optimizer.state_dict(), file)
        assert saved[0].getvalue() == saved[1].getvalue()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_of_another_format_are_refused(
    kind: str, tmp_path: Path, compose_run: Callable[..., RunConfig]
) -> None:
    model = Small()
    wide = build_optimizers(model, compose_run(f"optimizer={kind}").optimizer)
    for _ in gradients(list(model.parameters()), 1):
        for optimizer in wide:
            optimizer.step()
    checkpoint = open_checkpoint(save_checkpoint(tmp_path, model, wide, {"step": 1}, keep_last=1))
    with pytest.raises(UserError, match=r"in torch\.float32, not in torch\.bfloat16"):
        load_optimizers(checkpoint, build_optimizers(model, configured(kind, False)))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_stochastic_rounding_needs_moments_that_are_rounded(kind: str, compose_run: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError, match=r"nothing to round with moments=float32: set moments=bfloat16"):
        compose_run(f"optimizer={kind}", "optimizer.stochastic_rounding=true")
    with pytest.raises(UserError, match=r"optimizer\.moments"):
        compose_run(f"optimizer={kind}", "optimizer.moments=float16")
    both = compose_run(f"optimizer={kind}", "optimizer.moments=bfloat16", "optimizer.stochastic_rounding=true")
    assert (both.optimizer.moments, both.optimizer.stochastic_rounding) == ("bfloat16", True)


def test_a_configuration_from_before_these_settings_has_fp32_moments() -> None:
    assert AdamWConfig("adamw", 1e-2, (0.9, 0.95), 1e-8, 0.1, 1.0).moments == "float32"
