"""The FLOP formula against torch's own counter on the model that is trained, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_train.cost.flops import forward_flops, parameter_counts, training_flops_per_token
from moe_train.model.transformer import Transformer


def product(_sum: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
    """FLOPs of a product added in place, which torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


IN_PLACE = {torch.ops.aten.addmm_: product}
ARMS = {
    "mla": [],
    "mla_q_compressed": ["attention.q_lora_rank=12"],
    "gqa": ["attention=gqa_4x32", "attention.head_dim=8"],
    "no_shared_expert": ["moe.num_shared_experts=0"],
    "untied": ["tie_word_embeddings=false"],
    "dense": ["moe=null"],
    "dense_twin": ["dense_twin_of_moe=true"],
}


@pytest.mark.parametrize("arm", ARMS)
def test_the_formula_equals_torchs_counter_but_for_the_causal_half(
    arm: str, small_model: Callable[..., Transformer]
) -> None:
    model = small_model(*ARMS[arm])
    length = 24
    tokens, targets = torch.randint(0, 64, (2, 2, length))
    # The fused attention kernels hide their products from the counter; the plain one shows them, over all T² pairs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward, torch.no_grad():
        model(tokens, targets)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=IN_PLACE) as training:
        model(tokens, targets).objective.backward()

    parts = forward_flops(model.config, length, 64)
    whole_pairs = sum(parts.values()) + parts["attention_core"] * (2 * length / (length + 1) - 1)
    assert forward.get_total_flops() == pytest.approx(2 * length * whole_pairs, rel=1e-9)
    assert training.get_total_flops() == pytest.approx(3 * forward.get_total_flops(), rel=1e-9)
    assert training_flops_per_token(model.config, length, 64) == pytest.approx(3 * sum(parts.values()), rel=1e-12)


@pytest.mark.parametrize("arm", ARMS)
def test_parameters_by_formula_are_those_of_the_modules(arm: str, small_model: Callable[..., Transformer]) -> None:
    model = small_model(*ARMS[arm])
    assert parameter_counts(model.config, 64).total == sum(p.numel() for p in model.parameters())
