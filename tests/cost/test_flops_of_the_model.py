"""The FLOP formula against torch's own counter on the model that is trained, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_train.config import ModelConfig
from moe_train.cost.flops import forward_flops, parameter_counts, training_flops_per_token
from moe_train.model.transformer import Transformer

ARMS = {
    "mla": [],
    "mla_q_compressed": ["attention.q_lora_rank=12"],
    "gqa": ["attention=gqa_4x32", "attention.head_dim=8"],
    "gqa_heads_normed": ["attention=gqa_4x32", "attention.head_dim=8", "attention.qk_norm=per_head"],
    "gqa_vectors_normed": ["attention=gqa_4x32", "attention.head_dim=8", "attention.qk_norm=all_heads"],
    "mha": ["attention=gqa_4x32", "attention.num_key_value_heads=4"],
    "mqa": ["attention=gqa_4x32", "attention.num_key_value_heads=1"],
    "no_shared_expert": ["moe.num_shared_experts=0"],
    "untied": ["tie_word_embeddings=false"],
    "dense": ["moe=null"],
    "dense_twin": ["dense_twin_of_moe=equal_flops"],
    "dense_twin_of_all": ["dense_twin_of_moe=equal_params"],
    "groups": ["moe=group_limited"],
    "expert_choice": ["moe=expert_choice"],
    "expert_choice_half": ["moe=expert_choice", "moe.capacity_factor=0.5"],
    "mtp": ["mtp=depth_1"],
    "mtp_twice": ["mtp=depth_2", "tie_word_embeddings=false"],
    "mtp_dense": ["mtp=depth_2", "dense_twin_of_moe=equal_flops"],
}
VOCAB, SEQUENCES, LENGTH = 64, 2, 24


def with_all_pairs(config: ModelConfig) -> float:
    """The formula's forward FLOPs of the batch, and the half of attention that no query sees but the counter counts."""
    parts = forward_flops(config, LENGTH, VOCAB)
    unseen = parts["attention_core"] * (LENGTH - 1) / (LENGTH + 1)
    # An MTP module attends over LENGTH - depth positions: half of these pairs, (t - 1)/2 keys a query, are unseen too.
    core = parts["attention_core"] / config.num_hidden_layers / (LENGTH + 1)
    for depth in range(1, config.mtp_depth + 1):
        positions = LENGTH - depth
        unseen += core * (positions - 1) * positions / LENGTH
    return SEQUENCES * LENGTH * (sum(parts.values()) + unseen)


def counted(model: Transformer) -> tuple[int, int]:
    """FLOPs torch counts for a forward pass, and for a forward and backward pass."""
    tokens, targets = torch.randint(0, VOCAB, (2, SEQUENCES, LENGTH))
    # The fused attention kernels hide their products from the counter; the plain one shows them, over all T² pairs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward, torch.no_grad():
        model(tokens, targets)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as training:
        model(tokens, targets).objective.backward()
    return forward.get_total_flops(), training.get_total_flops()


@pytest.mark.parametrize("arm", ARMS)
def test_the_formula_equals_torchs_counter_but_for_the_causal_half(
    arm: str, small_model: Callable[..., Transformer]
) -> None:
    model = small_model(*ARMS[arm])
    forward, training = counted(model)
    assert forward == pytest.approx(with_all_pairs(model.config), rel=1e-9)
    assert training == pytest.approx(3 * forward, rel=1e-9)
    formula = forward_flops(model.config, LENGTH, VOCAB)
    assert training_flops_per_token(model.config, LENGTH, VOCAB) == pytest.approx(3 * sum(formula.values()), rel=1e-12)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_with_a_capacity_the_layer_also_multiplies_its_empty_places(
    factor: float, small_model: Callable[..., Transformer]
) -> None:
    model = small_model("moe=switch", f"moe.capacity_factor={factor}")
    routed = forward_flops(model.config, LENGTH, VOCAB)["routed_experts"] * SEQUENCES * LENGTH
    forward, _ = counted(model)
    assert forward == pytest.approx(with_all_pairs(model.config) + routed * (factor - 1), rel=1e-9)


@pytest.mark.parametrize("arm", ARMS)
def test_parameters_by_formula_are_those_of_the_modules(arm: str, small_model: Callable[..., Transformer]) -> None:
    model = small_model(*ARMS[arm])
    counts = parameter_counts(model.config, VOCAB)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.mtp == sum(p.numel() for p in model.mtp.parameters())
