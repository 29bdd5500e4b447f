"""Tiny models of transformers' own architectures, with odd settings and random weights, and how they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from moe_train.interop.names import Names, Place

VOCAB = 300
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # of the size of trained weights: differences would show
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
DEEPSEEK = {
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}

# A family's name, and what differs from the sizes above.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v3_groups": ("DeepseekV3", MLA | DEEPSEEK | {"n_group": 4, "topk_group": 2, "num_mtp_layers": 0}),
    "v3_yarn_tied_no_shared": (
        "DeepseekV3",
        MLA
        | DEEPSEEK
        | {
            "q_lora_rank": None,
            "n_shared_experts": 0,
            "first_k_dense_replace": 2,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "num_mtp_layers": 0,
            "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
        },
    ),
    "v3_all_moe": (
        "DeepseekV3",
        MLA
        | DEEPSEEK
        | {"first_k_dense_replace": 0, "n_shared_experts": 2, "n_group": 1, "topk_group": 1, "num_mtp_layers": 0},
    ),
    "v3_dense": ("DeepseekV3", MLA | DEEPSEEK | {"first_k_dense_replace": 3, "num_mtp_layers": 0}),
    "v2": ("DeepseekV2", MLA | DEEPSEEK | {"q_lora_rank": None, "n_shared_experts": 2, "first_k_dense_replace": 0}),
    "v2_groups": (
        "DeepseekV2",
        MLA
        | DEEPSEEK
        | {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.7},
    ),
    "llama": ("Llama", {"num_key_value_heads": 1, "head_dim": 10, "rope_parameters": LLAMA3}),
    "llama_tied_mha": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16, "rope_parameters": YARN}),
    "mixtral": ("Mixtral", {"num_key_value_heads": 2, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3_moe_normed": (
        "Qwen3Moe",
        {
            "num_key_value_heads": 2,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
    ),
    "olmoe": ("Olmoe", {"num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 3}),
    "olmoe_gqa": ("Olmoe", {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 1}),
    "glm4_moe": (
        "Glm4Moe",
        DEEPSEEK
        | {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "use_qk_norm": True,
            "n_group": 2,
            "topk_group": 1,
            "num_mtp_layers": 0,
            "rope_parameters": YARN | {"partial_rotary_factor": 1.0},
        },
    ),
}


def their_config(case: str, **changes: Any) -> Any:
    """The configuration of a case, with the plain implementations."""
    family, settings = CASES[case]
    config = getattr(transformers, f"{family}Config")(**(BASE | settings | changes))
    config._attn_implementation = config._experts_implementation = "eager"
    return config


def randomise(model: nn.Module) -> None:
    """Norms away from one, routers with clear choices, selection biases that change choices."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("correction_bias", "selection_bias")):
                tensor.normal_(0, 0.1)
            elif tensor.ndim == 1:
                tensor.normal_(1, 0.2)
            elif name.endswith(("gate.weight", "router.weight")):
                tensor.normal_(0, 0.3)


def gradients_on_disk(model: nn.Module, names: Names) -> dict[str, torch.Tensor]:
    """The gradients of a model of transformers under the names its weights have on disk, experts one by one."""
    gate, up, down = names.expert
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        name = name.replace(".mlp.experts.", f".{names.moe}.experts.").replace(".mlp.gate.", f".{names.moe}.gate.")
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(parameter.grad):
                halves = zip((gate, up), both.chunk(2), strict=True)
                found |= {f"{name.removesuffix('gate_up_proj')}{expert}.{half}.weight": g for half, g in halves}
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            found |= {f"{stem}{expert}.{down}.weight": g for expert, g in enumerate(parameter.grad)}
        else:
            found[name] = parameter.grad
    return found


def largest_difference(ours: nn.Module, where: dict[str, list[Place]], theirs: dict[str, torch.Tensor]) -> float:
    """The largest relative error, by norm, of the gradients of all parameters of ours; each part has to be there."""
    worst = 0.0
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        expected = torch.full_like(parameter, torch.nan)
        for place in where[name]:
            place.fill(expected, theirs[place.theirs])
        assert expected.norm() > 0, name
        worst = max(worst, ((parameter.grad - expected).norm() / expected.norm()).item())
    return worst


def load_theirs(folder: Path, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """What AutoModelForCausalLM makes of a folder, and what it says of its keys where that is not nothing."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, **EAGER, **options
    )
    return model.eval(), {key: value for key, value in info.items() if value}
