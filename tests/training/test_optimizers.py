"""Which parameter is in which group, on a small tree with every kind of parameter there is."""

import dataclasses
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from moe_train.compose import validated
from moe_train.config import AdamWConfig, MuonConfig, PrecisionConfig
from moe_train.training.muon import Muon
from moe_train.training.optimizers import build_optimizers, set_lr
from moe_train.uncompiled import AdamW

CONFIGS = Path(__file__).parents[2] / "configs"

ADAMW = AdamWConfig(kind="adamw", lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)
MUON = MuonConfig(
    kind="muon",
    lr=3e-3,
    momentum=0.95,
    nesterov=True,
    ns_steps=5,
    weight_decay=0.1,
    max_grad_norm=1.0,
    adamw_betas=(0.9, 0.95),
    adamw_eps=1e-8,
)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4, bias=False)
        self.gate_up = nn.Parameter(torch.randn(4, 12, 8))


class Model(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(16, 8)
        self.norm = nn.RMSNorm(8)
        self.proj = nn.Linear(8, 8)
        self.moe = Experts()
        self.frozen = nn.Parameter(torch.zeros(8, 8), requires_grad=False)
        self.lm_head = nn.Linear(8, 16, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight


def groups_by_name(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, tuple[type, float]]:
    """Optimizer class and weight decay of each parameter; each must be in one group only."""
    names = {id(p): name for name, p in model.named_parameters()}
    placed: dict[str, tuple[type, float]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert names[id(parameter)] not in placed
                placed[names[id(parameter)]] = (type(optimizer), group["weight_decay"])
    return placed


def test_adamw_decays_matrices_only():
    adamw = AdamW
    model = Model(tied=False)
    assert groups_by_name(model, build_optimizers(model, ADAMW)) == {
        "embed_tokens.weight": (adamw, 0.0),
        "norm.weight": (adamw, 0.0),
        "proj.weight": (adamw, 0.1),
        "proj.bias": (adamw, 0.0),
        "moe.router.weight": (adamw, 0.1),
        "moe.gate_up": (adamw, 0.1),
        "lm_head.weight": (adamw, 0.1),
    }


def test_muon_takes_hidden_matrices_and_experts_and_leaves_the_rest_to_adamw():
    adamw = AdamW
    model = Model(tied=False)
    assert groups_by_name(model, build_optimizers(model, MUON)) == {
        "embed_tokens.weight": (adamw, 0.0),
        "norm.weight": (adamw, 0.0),
        "proj.weight": (Muon, 0.1),
        "proj.bias": (adamw, 0.0),
        "moe.router.weight": (adamw, 0.1),
        "moe.gate_up": (Muon, 0.1),
        "lm_head.weight": (adamw, 0.1),
    }


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_a_tied_head_is_the_embedding(config):
    model = Model(tied=True)
    placed = groups_by_name(model, build_optimizers(model, config))
    assert placed["embed_tokens.weight"] == (AdamW, 0.0)
    assert "lm_head.weight" not in placed


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_one_factor_sets_every_rate_from_its_peak(config):
    optimizers = build_optimizers(Model(tied=False), config)
    for factor in (0.25, 1.0):
        set_lr(optimizers, factor)
        assert {group["lr"] for o in optimizers for group in o.param_groups} == {config.lr * factor}


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_training_lowers_the_loss_of_a_small_model(config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    x = torch.randn(64, 8)
    optimizers = build_optimizers(model, dataclasses.replace(config, lr=0.02))
    losses = []
    for _ in range(20):
        loss = (model(x) - x).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("name", "schema"), [("adamw", AdamWConfig), ("muon", MuonConfig)])
def test_every_optimizer_on_offer_gives_all_its_keys(name, schema):
    path = CONFIGS / "optimizer" / f"{name}.yaml"
    assert validated(schema, OmegaConf.to_container(OmegaConf.load(path)), str(path)).kind == name


@pytest.mark.parametrize("path", sorted((CONFIGS / "precision").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_precision_on_offer_gives_all_its_keys(path):
    assert validated(PrecisionConfig, OmegaConf.to_container(OmegaConf.load(path)), str(path)).name == path.stem


def test_adamw_without_the_compiler_is_torchs_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(6, 5, generator=generator), torch.randn(7, generator=generator)]
    mine, theirs = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
    settings = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
    optimizers = AdamW(mine, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(5):
        for one, other in zip(mine, theirs):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs))
    assert not any(parameter.grad_fn for parameter in mine)
    optimizers[0].load_state_dict(optimizers[1].state_dict())
