"""The architectures of transformers that a model can be written as and read from, each a few lines of data.

Checked against transformers' own classes in tests/interop. To add one: its data here, a case in tests/interop.
"""

from __future__ import annotations

from moe_train.config import ModelConfig
from moe_train.errors import UserError
from moe_train.interop.family import Family
from moe_train.interop.names import Names

FAMILIES = (
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        attention="mla",
        moe="can",
        names=Names(selection_bias=True, shared_experts=True, interleaved_rope=True),
        scoring_func="sigmoid",
        groups=2,
        routed_scaling_factor=True,
        dense_layers="first_k_dense_replace",
        mtp=True,
    ),
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        attention="mla",
        moe="can",
        names=Names(shared_experts=True, interleaved_rope=True),
        scoring_func="softmax",
        groups=1,
        norm_topk_prob=False,  # their router ignores the key
        routed_scaling_factor=True,
        dense_layers="first_k_dense_replace",
        heads_divide_hidden=True,
    ),
    Family(
        "llama",
        "LlamaForCausalLM",
        attention="gqa",
        moe="cannot",
        names=Names(),
        heads_divide_hidden=True,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        attention="gqa",
        moe="cannot",
        names=Names(),
        qk_norm=("per_head",),
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        attention="gqa",
        moe="must",
        names=Names(moe="block_sparse_moe", expert=("w1", "w3", "w2")),
        scoring_func="softmax",
        norm_topk_prob=True,
        experts_key="num_local_experts",
        expert_width_key="intermediate_size",
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        attention="gqa",
        moe="must",
        names=Names(),
        qk_norm=("per_head",),
        scoring_func="softmax",
        dense_layers="mlp_only_layers",
        experts_key="num_experts",
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        attention="gqa",
        moe="must",
        names=Names(),
        qk_norm=("all_heads",),
        scoring_func="softmax",
        experts_key="num_experts",
        expert_width_key="intermediate_size",
        heads_fill_hidden=True,
    ),
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        attention="gqa",
        moe="must",
        names=Names(selection_bias=True, shared_experts=True),
        qk_norm=(None, "per_head"),
        scoring_func="sigmoid",
        groups=2,
        routed_scaling_factor=True,
        dense_layers="first_k_dense_replace",
        mtp=True,
    ),
)


def family_named(name: str) -> Family:
    for family in FAMILIES:
        if family.model_type == name:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(f"family={name} is unknown: choose auto or one of {known}")


def choose_family(model: ModelConfig, asked: str, *, biased: bool) -> Family:
    """The family asked for, or with `auto` the first that can express the model. Raises UserError if it cannot."""
    if model.moe is not None and model.moe.routing == "expert_choice":
        raise UserError(
            "model.moe.routing=expert_choice has no place in any family, since its experts look at later tokens too: "
            "train a model with another model/moe"
        )
    fitting = [family for family in FAMILIES if not list(family.obstacles(model, biased=biased))]
    if asked == "auto":
        if fitting:
            return fitting[0]
        other_ffn = "cannot" if model.moe is not None else "must"
        alike = [f for f in FAMILIES if f.attention == model.attention.kind and f.moe != other_ffn]
        nearest = min(alike, key=lambda family: len(list(family.obstacles(model, biased=biased))))
        without = " and ".join(nearest.obstacles(model, biased=biased))
        raise UserError(f"no family takes this model: the nearest, {nearest.model_type}, has no place for {without}")
    family = family_named(asked)
    obstacle = next(family.obstacles(model, biased=biased), None)
    if obstacle is not None:
        others = f"family={fitting[0].model_type} takes it" if fitting else "no other family takes the model either"
        raise UserError(f"{obstacle} has no place in {family.model_type}: {others}")
    return family
