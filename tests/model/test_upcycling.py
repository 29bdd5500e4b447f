"""A mixture made of a dense model computes what that did, and is one that can be trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_train.errors import UserError
from moe_train.model.transformer import Transformer
from moe_train.model.upcycling import upcycled

Make = Callable[..., Transformer]
WIDTH = 48  # of the dense FFNs of small_model


def mixture_of(dense: Transformer, small_model: Make, *overrides: str) -> Transformer:
    made = small_model(*overrides)
    shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
    made.load_state_dict(upcycled(dense.state_dict(), made.config, shapes, seed=0))
    return made


@pytest.mark.parametrize(
    "overrides",
    [
        [f"moe.moe_intermediate_size={WIDTH}"],  # whole copies
        [f"moe.moe_intermediate_size={WIDTH}", "moe.top_k=3", "moe.routed_scaling_factor=2.5"],
        ["moe.moe_intermediate_size=24", "moe.top_k=4"],  # halves
        ["moe.moe_intermediate_size=16", "moe.num_experts=12", "moe.top_k=3"],  # thirds, one replica chosen
        ["moe.moe_intermediate_size=20", "moe.num_experts=12", "moe.top_k=6"],  # the last third is padded
        [f"moe.moe_intermediate_size={WIDTH}", "moe=gshard", "moe.capacity_factor=4.0"],
        ["moe.moe_intermediate_size=24", "moe.num_shared_experts=0", "moe.first_k_dense_replace=0"],
        ["moe.moe_intermediate_size=64"],  # wider than the dense FFN
        ["moe.moe_intermediate_size=24", "mtp=depth_1"],
    ],
    ids=str,
)
def test_it_starts_as_the_dense_models_function(overrides: list[str], small_model: Make) -> None:
    mtp = ["mtp=depth_1"] if "mtp=depth_1" in overrides else []
    dense = small_model("moe=null", *mtp, seed=3)
    mixture = mixture_of(dense, small_model, *overrides)
    tokens, targets = torch.randint(0, 64, (2, 3, 9))
    torch.testing.assert_close(mixture.logits(tokens), dense.logits(tokens), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mixture(tokens, targets).mtp_nll_k, dense(tokens, targets).mtp_nll_k)


def test_every_part_of_it_can_learn(small_model: Make) -> None:
    overrides = ["moe.moe_intermediate_size=20", "moe.num_experts=6", "moe.top_k=6"]  # all experts, one padded slice
    mixture = mixture_of(small_model("moe=null"), small_model, *overrides)
    optimizer = torch.optim.SGD(mixture.parameters(), lr=0.1)
    tokens, targets = torch.randint(0, 64, (2, 4, 9))
    for _ in range(2):  # what starts at zero passes gradient on from the second step
        optimizer.zero_grad()
        mixture(tokens, targets).objective.backward()
        optimizer.step()
    for name, parameter in mixture.named_parameters():
        assert parameter.grad is not None
        if name.endswith(("gate_up_proj", "gate_up_proj.weight")):
            assert (parameter.grad.abs().sum(-1) > 0).all(), name  # every neuron
        else:
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["moe.moe_intermediate_size=16", "moe.top_k=2"],
            r"num_experts=8 is no multiple of 3.*moe_intermediate_size=48",
        ),
        (["moe.moe_intermediate_size=24", "moe.top_k=3"], "top_k=3 is no multiple of 2"),
        (["moe.norm_topk_prob=false"], "model.moe.norm_topk_prob=true"),
        (["moe=expert_choice"], "model.moe.routing=token_choice"),
        (["moe.moe_intermediate_size=48", "intermediate_size=64"], "model.intermediate_size=48"),
        (["moe.moe_intermediate_size=48", "mtp=depth_1"], "nothing to start from"),
        (["moe.moe_intermediate_size=48", "attention.v_head_dim=8"], "give the mixture the sizes of the dense model"),
        (["moe=null"], "is dense"),
    ],
    ids=str,
)
def test_a_mixture_that_would_be_another_function_is_refused_with_the_remedy(
    overrides: list[str], message: str, small_model: Make
) -> None:
    with pytest.raises(UserError, match=message):
        mixture_of(small_model("moe=null"), small_model, *overrides)
