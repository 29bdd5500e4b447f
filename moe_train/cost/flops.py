"""FLOPs per token and parameter counts, by formula from the configuration.

Counted are the matrix products, at 2 FLOPs a multiply-add; norms, softmax, rotations, activations and the embedding
lookup are left out (well under 1% of a training step's arithmetic). Attention is causal: averaged over a sequence of
T tokens a query attends to (T + 1) / 2 keys, and only these are counted. The backward pass costs twice the forward
pass (gradients of inputs and of weights), so training is 3 x forward; recomputed activations are never counted.

Nothing is read from torch modules: wrapping or quantising a layer cannot change the count. Check: DeepSeek-V3's shape
gives 671.03B parameters, 37.55B of them active, and 250 GFLOPs a trained token at T = 4096 (arXiv 2412.19437;
2505.09343, table 2).
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config import MLAConfig, ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """`total` counts every parameter tensor once; `active` leaves out the routed experts a token does not visit."""

    total: int
    active: int


def _attention_weights(model: ModelConfig) -> int:
    """Weights of one layer's projections (no biases), which is also their multiply-adds per token."""
    attention, hidden = model.attention, model.hidden_size
    heads = attention.num_attention_heads
    if isinstance(attention, MLAConfig):
        if attention.q_lora_rank is None:
            q = hidden * heads * attention.qk_head_dim
        else:
            q = attention.q_lora_rank * (hidden + heads * attention.qk_head_dim)
        kv_a = hidden * (attention.kv_lora_rank + attention.qk_rope_head_dim)
        kv_b = attention.kv_lora_rank * heads * (attention.qk_nope_head_dim + attention.v_head_dim)
        return q + kv_a + kv_b + heads * attention.v_head_dim * hidden
    return 2 * hidden * attention.head_dim * (heads + attention.num_key_value_heads)


def _attention_core_macs(model: ModelConfig, sequence_length: int) -> float:
    """Multiply-adds per token of one layer's Q K^T and P V, the causal half only."""
    attention = model.attention
    qk, v = (
        (attention.qk_head_dim, attention.v_head_dim)
        if isinstance(attention, MLAConfig)
        else (attention.head_dim, attention.head_dim)
    )
    return attention.num_attention_heads * (qk + v) * (sequence_length + 1) / 2


def _swiglu_weights(hidden: int, width: int) -> int:
    return 3 * hidden * width  # gate, up, down


def forward_flops(model: ModelConfig, sequence_length: int, vocab_size: int) -> dict[str, float]:
    """Forward FLOPs per token by part, summed over layers; T = `sequence_length` tokens attend to each other.

    `vocab_size` is the built model's, padding included. The input embedding is a lookup and costs nothing.
    """
    model = model.resolved()
    layers, hidden, moe = model.num_hidden_layers, model.hidden_size, model.moe
    macs: dict[str, float] = {
        "attention_projections": layers * _attention_weights(model),
        "attention_core": layers * _attention_core_macs(model, sequence_length),
        "dense_ffn": (layers - model.num_moe_layers) * _swiglu_weights(hidden, model.intermediate_size),
        "router": 0,
        "routed_experts": 0,
        "shared_experts": 0,
        "head": hidden * vocab_size,
    }
    if moe is not None:
        expert = _swiglu_weights(hidden, moe.moe_intermediate_size)
        macs["router"] = model.num_moe_layers * hidden * moe.num_experts
        macs["routed_experts"] = model.num_moe_layers * moe.top_k * expert
        macs["shared_experts"] = model.num_moe_layers * moe.num_shared_experts * expert
    return {part: 2.0 * count for part, count in macs.items()}


def training_flops_per_token(model: ModelConfig, sequence_length: int, vocab_size: int) -> float:
    """FLOPs of forward and backward for one trained token: 3 x forward."""
    return 3 * sum(forward_flops(model, sequence_length, vocab_size).values())


def parameter_counts(model: ModelConfig, vocab_size: int) -> ParameterCounts:
    """Parameters of the built model: norms included, a tied head once; the selection bias is a buffer, not a parameter.

    The input embedding counts as active.
    """
    model = model.resolved()
    hidden, moe, attention = model.hidden_size, model.moe, model.attention
    block = _attention_weights(model) + 2 * hidden  # two RMSNorms
    if isinstance(attention, MLAConfig):
        block += attention.kv_lora_rank + (attention.q_lora_rank or 0)  # RMSNorms on the compressed kv and q
    total = model.num_hidden_layers * block + hidden  # and the final norm
    total += (1 if model.tie_word_embeddings else 2) * vocab_size * hidden
    total += (model.num_hidden_layers - model.num_moe_layers) * _swiglu_weights(hidden, model.intermediate_size)
    if moe is None:
        return ParameterCounts(total, total)
    expert = _swiglu_weights(hidden, moe.moe_intermediate_size)
    experts = (moe.num_experts + moe.num_shared_experts) * expert
    total += model.num_moe_layers * (hidden * moe.num_experts + experts)
    unvisited = model.num_moe_layers * (moe.num_experts - moe.top_k) * expert
    return ParameterCounts(total, total - unvisited)
