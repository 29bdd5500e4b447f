"""Memory by formula from the configuration: what a device holds while training, and what a cached token takes.

Weights, gradients and optimizer states are exact (but for AdamW's step counters, one number a tensor). Everything lives
on one device in FP32, nothing is sharded. Activations are an estimate of what autograd keeps from forward to backward,
added up layer by layer for the layers as they are written; `ASSUMPTIONS` says under which conditions. It is for
choosing a batch that fits, not for accounting: allocator and libraries take their share on top.
"""

from __future__ import annotations

from moe_train.config import MLAConfig, ModelConfig, MoEConfig, MuonConfig, OptimizerConfig
from moe_train.cost.flops import (
    ATTENTION_PROJECTIONS,
    DENSE_FFN,
    MTP,
    ROUTED_EXPERTS,
    SHARED_EXPERTS,
    layer_kinds,
    layer_parameters,
    main_parameters,
    mtp_parameters,
)

ASSUMPTIONS = (
    "one device holds the whole model; nothing is sharded or moved to the CPU",
    "master weights, gradients, optimizer states and the residual stream are FP32",
    "attention is a fused kernel: no score matrix is kept",
    "norms keep their input and their result in FP32 (torch's plain form; a fused kernel keeps the input alone)",
    "in BF16 every product keeps its own cast of its input, and the cast weights are kept until the backward pass",
    "experts are evenly loaded; a place that capacity leaves empty is kept like a filled one",
    "activation checkpointing keeps the inputs of every layer, and one layer's activations are alive at a time",
    "dropout off; allocator overhead, communication buffers and the optimizer's temporaries are left out",
)

# Elements of the logits that are alive at a time (model/loss.py).
LOGITS_CHUNK_ELEMENTS = 2**21

_FP32 = 4
# What Muon moves, where it is the optimizer (training/optimizers.py), and what is cast before a product.
_HIDDEN_MATRICES = (ATTENTION_PROJECTIONS, DENSE_FFN, ROUTED_EXPERTS, SHARED_EXPERTS, MTP)


def cache_elements_per_token(model: ModelConfig) -> int:
    """Elements the main model keeps of every position while it generates, over all layers.

    MLA: one compressed vector and one rotary key a layer (DeepSeek-V2, arXiv 2405.04434, table 1); otherwise keys and
    values of the key-value heads. Speculative decoding with an MTP module adds one layer's for each module.
    """
    attention = model.attention
    if isinstance(attention, MLAConfig):
        return model.num_hidden_layers * (attention.kv_lora_rank + attention.qk_rope_head_dim)
    return model.num_hidden_layers * 2 * attention.num_key_value_heads * attention.head_dim


def training_memory(
    model: ModelConfig,
    vocab_size: int,
    tokens: int,
    optimizer: OptimizerConfig,
    *,
    compute_bytes: int,
    activation_checkpointing: bool,
) -> dict[str, int]:
    """Bytes by part on a device that takes `tokens` tokens at once (a micro-batch, not a whole batch).

    `compute_bytes`: 2 where matrix products run in BF16, 4 in FP32.
    """
    model = model.resolved()
    main, mtp = main_parameters(model, vocab_size), mtp_parameters(model)
    parameters = sum(main.values()) + sum(mtp.values())
    routing_biases = 0 if model.moe is None else model.num_routers * model.moe.num_experts
    rows = min(tokens, max(1, LOGITS_CHUNK_ELEMENTS // vocab_size))
    head = vocab_size * model.hidden_size
    in_halves = compute_bytes < _FP32
    return {
        "weights": _FP32 * (parameters + routing_biases),
        "gradients": _FP32 * parameters,
        "optimizer_states": _FP32 * _state_elements(main, mtp, optimizer),
        "weight_copies": compute_bytes * _copied_weights(model, activation_checkpointing) if in_halves else 0,
        "activations": _activations(model, tokens, compute_bytes, activation_checkpointing),
        # Kept by the loss until the backward pass: the gradient of the head, once for every prediction.
        "head_gradients": _FP32 * head * (1 + model.mtp_depth),
        # A chunk of logits, the head cast, and the product that is added to its gradient.
        "loss_workspace": rows * vocab_size * (_FP32 + (compute_bytes if in_halves else 0))
        + head * compute_bytes * (2 if in_halves else 1),
    }


def _state_elements(main: dict[str, int], mtp: dict[str, int], optimizer: OptimizerConfig) -> int:
    """Two moments a parameter with AdamW; with Muon one momentum for hidden matrices, AdamW's two for the rest."""
    parameters = sum(main.values()) + sum(mtp.values())
    if not isinstance(optimizer, MuonConfig):
        return 2 * parameters
    return 2 * parameters - sum(parts.get(part, 0) for parts in (main, mtp) for part in _HIDDEN_MATRICES)


def _layers(model: ModelConfig) -> list[tuple[bool, int]]:
    """Kinds of layers and how many, blocks of MTP modules included."""
    kinds = layer_kinds(model)
    return [*kinds, (model.moe is not None, model.mtp_depth)] if model.mtp_depth else kinds


def _copied_weights(model: ModelConfig, activation_checkpointing: bool) -> int:
    """Weights that exist in the compute format as well, at the moment when most do.

    Autocast keeps the casts of plain matrices until the forward pass ends, kept activations or not; those of routed
    experts are let go with the activations.
    """
    joins = 2 * model.mtp_depth * model.hidden_size**2
    whole, without_experts, largest = joins, joins, 0
    for is_moe, count in _layers(model):
        parts = layer_parameters(model, is_moe)
        matrices = sum(parts.get(part, 0) for part in _HIDDEN_MATRICES)
        whole += count * matrices
        without_experts += count * (matrices - parts.get(ROUTED_EXPERTS, 0))
        largest = max(largest, matrices)
    return max(without_experts, largest) if activation_checkpointing else whole


def _activations(model: ModelConfig, tokens: int, compute_bytes: int, activation_checkpointing: bool) -> int:
    """Bytes kept for the backward pass of `tokens` tokens; MTP modules as if they had all positions."""
    residual = _FP32 * model.hidden_size
    outside = 3 * residual + 8  # final norm, the gradient that the loss keeps, token ids
    per_module = 7 * residual + _entering(
        2 * model.hidden_size, 1, compute_bytes
    )  # three norms, loss, the join's input
    layers = [(_layer_bytes(model, is_moe, compute_bytes), count) for is_moe, count in _layers(model)]
    if not activation_checkpointing:
        kept = outside + model.mtp_depth * per_module + sum(count * size for size, count in layers)
        return round(tokens * kept)
    # The joined states enter an MTP module from two sides; its final norm is computed again, its loss is not.
    inputs = model.num_hidden_layers * residual + model.mtp_depth * 3 * residual
    return round(tokens * (outside + inputs + max(size for size, _ in layers) + (per_module if model.mtp_depth else 0)))


def _entering(features: int, products: int, compute_bytes: int) -> int:
    """Bytes of the input of one or several products: a cast for each in BF16, the same tensor in FP32."""
    return features * compute_bytes * (products if compute_bytes < _FP32 else 1)


def _norm(features: int) -> int:
    return 2 * _FP32 * features + _FP32  # input, result before the weight, one scale


def _layer_bytes(model: ModelConfig, is_moe: bool, compute_bytes: int) -> float:
    """Bytes a token that one layer keeps."""
    kept = 2 * _norm(model.hidden_size) + _attention_bytes(model, compute_bytes)
    if is_moe and model.moe is not None:
        return kept + _moe_bytes(model.moe, model.hidden_size, compute_bytes)
    return kept + _swiglu_bytes(model.hidden_size, model.intermediate_size, compute_bytes)


def _attention_bytes(model: ModelConfig, compute_bytes: int) -> int:
    attention, hidden = model.attention, model.hidden_size
    heads = attention.num_attention_heads
    if isinstance(attention, MLAConfig):
        latents = _norm(attention.kv_lora_rank) + _entering(attention.kv_lora_rank, 1, compute_bytes)
        if attention.q_lora_rank is not None:
            latents += _norm(attention.q_lora_rank) + _entering(attention.q_lora_rank, 1, compute_bytes)
        q = k = heads * attention.qk_head_dim
        kv = heads * (attention.qk_nope_head_dim + attention.v_head_dim)  # the values are a view of both
        out = heads * attention.v_head_dim
        return latents + _entering(hidden, 2, compute_bytes) + _core_bytes(q + k + kv, out, heads, compute_bytes)
    q, kv = heads * attention.head_dim, attention.num_key_value_heads * attention.head_dim
    norms = 0
    if attention.qk_norm is not None:
        vectors = 1 if attention.qk_norm == "all_heads" else heads + attention.num_key_value_heads
        norms = 2 * _FP32 * (q + kv) + _FP32 * vectors
    return norms + _entering(hidden, 3, compute_bytes) + _core_bytes(q + 2 * kv, q, heads, compute_bytes)


def _core_bytes(qkv: int, out: int, heads: int, compute_bytes: int) -> int:
    """Queries, keys, values, mixed values twice (as they leave, as the projection reads them), log-sum-exps."""
    return compute_bytes * (qkv + 2 * out) + _FP32 * heads


def _swiglu_bytes(hidden: int, width: int, compute_bytes: int) -> int:
    """Input; gate and up, silu(gate), their product."""
    return _entering(hidden, 1, compute_bytes) + 4 * width * compute_bytes


def _moe_bytes(moe: MoEConfig, hidden: int, compute_bytes: int) -> float:
    """Router, pairs of tokens and experts, shared experts."""
    scores = _FP32 * (hidden + moe.num_experts * (2 if moe.batch_loss_weight or moe.router_z_loss_weight else 1))
    pairs = moe.experts_per_token
    indices_and_gates = 8 * 4 * pairs
    if moe.capacity_factor is not None:  # places are kept, filled or not; their sum is made from an FP32 copy
        pairs = min(moe.capacity_factor * moe.top_k, moe.num_experts)
        indices_and_gates += _FP32 * hidden * pairs
    # The row; gate and up, silu(gate), their product, the same times the gate value.
    routed = pairs * compute_bytes * (hidden + 5 * moe.moe_intermediate_size)
    shared = 0
    if moe.num_shared_experts:
        width = moe.num_shared_experts * moe.moe_intermediate_size
        shared = 4 * width * compute_bytes + (_entering(hidden, 1, compute_bytes) if compute_bytes < _FP32 else 0)
    return scores + indices_and_gates + routed + shared
