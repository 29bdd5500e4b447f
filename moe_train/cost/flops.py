"""FLOPs per token and parameter counts, by formula from the configuration.

Counted are the matrix products, at 2 FLOPs a multiply-add; norms, softmax, rotations, activations and the embedding
lookup are left out (well under 1% of a training step's arithmetic). Attention is causal: averaged over a sequence of
T tokens a query attends to (T + 1) / 2 keys, and only these are counted. The backward pass costs twice the forward
pass (gradients of inputs and of weights), so training is 3 x forward; recomputed activations are never counted.

Multi-token prediction: module k works on T - k of a sequence's T positions, which also attend to each other alone; its
FLOPs are shared out among all T tokens.

Routing: a token counts as visiting top_k experts. With expert choice it is capacity_factor · top_k on average, since
every expert takes that share of the tokens (the built layer rounds its places up: below 1% from a hundred places on).
With token choice and a capacity it is min(1, capacity_factor) · top_k, the most that fits: tokens dropped by uneven
load are counted, empty places, which are multiplied too, are not. Both are arithmetic the model asks for, not how it is
done.

Nothing is read from torch modules: wrapping or quantising a layer cannot change the count. Check: DeepSeek-V3's shape
gives 671.03B parameters, 37.55B of them active, and 250 GFLOPs a trained token at T = 4096 (arXiv 2412.19437;
2505.09343, table 2).
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config import MLAConfig, ModelConfig

# The parts of a layer, as they stand in every table.
ATTENTION_PROJECTIONS, ATTENTION_CORE, NORMS = "attention_projections", "attention_core", "norms"
DENSE_FFN, ROUTER, ROUTED_EXPERTS, SHARED_EXPERTS = "dense_ffn", "router", "routed_experts", "shared_experts"
EMBEDDING, HEAD, MTP = "embedding", "head", "mtp"
PARTS = (
    EMBEDDING,
    ATTENTION_PROJECTIONS,
    ATTENTION_CORE,
    NORMS,
    DENSE_FFN,
    ROUTER,
    ROUTED_EXPERTS,
    SHARED_EXPERTS,
    HEAD,
    MTP,
)


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the built model.

    `total` counts every tensor once, those of MTP modules too; `mtp` is these alone. `active` is what the next token
    is predicted with: it leaves out the MTP modules and the routed experts a token does not visit.
    """

    total: int
    active: int
    mtp: int


def layer_kinds(model: ModelConfig) -> list[tuple[bool, int]]:
    """(whether it is an MoE layer, how many there are) of the main model's layers, in order."""
    kinds = [(False, model.num_hidden_layers - model.num_moe_layers), (True, model.num_moe_layers)]
    return [(is_moe, count) for is_moe, count in kinds if count]


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


def _norm_weights(model: ModelConfig) -> int:
    """RMSNorm weights of one layer: two on the residual stream, and those within attention."""
    attention = model.attention
    count = 2 * model.hidden_size
    if isinstance(attention, MLAConfig):
        return count + attention.kv_lora_rank + (attention.q_lora_rank or 0)
    if attention.qk_norm == "per_head":  # one weight serves all heads
        return count + 2 * attention.head_dim
    if attention.qk_norm == "all_heads":
        return count + attention.head_dim * (attention.num_attention_heads + attention.num_key_value_heads)
    return count


def _swiglu_weights(hidden: int, width: int) -> int:
    return 3 * hidden * width  # gate, up, down


def layer_parameters(model: ModelConfig, is_moe: bool) -> dict[str, int]:
    """Parameters of one layer by part; the selection bias is a buffer, not a parameter."""
    hidden, moe = model.hidden_size, model.moe
    parts = {ATTENTION_PROJECTIONS: _attention_weights(model), NORMS: _norm_weights(model)}
    if not is_moe or moe is None:
        return parts | {DENSE_FFN: _swiglu_weights(hidden, model.intermediate_size)}
    expert = _swiglu_weights(hidden, moe.moe_intermediate_size)
    return parts | {
        ROUTER: hidden * moe.num_experts,
        ROUTED_EXPERTS: moe.num_experts * expert,
        SHARED_EXPERTS: moe.num_shared_experts * expert,
    }


def _layer_macs(model: ModelConfig, is_moe: bool, sequence_length: int) -> dict[str, float]:
    """Multiply-adds per token of one layer by part: every weight of a product once, of the experts those visited."""
    parts: dict[str, float] = {**layer_parameters(model, is_moe)}
    del parts[NORMS]
    parts[ATTENTION_CORE] = _attention_core_macs(model, sequence_length)
    if is_moe and model.moe is not None:
        parts[ROUTED_EXPERTS] *= model.moe.experts_per_token / model.moe.num_experts
    return parts


def forward_flops(model: ModelConfig, sequence_length: int, vocab_size: int) -> dict[str, float]:
    """Forward FLOPs per token by part, summed over layers; T = `sequence_length` tokens attend to each other.

    `vocab_size` is the built model's, padding included. The input embedding is a lookup and costs nothing.
    """
    parts = main_forward_flops(model, sequence_length, vocab_size)
    return parts | {MTP: sum(mtp_forward_flops(model, sequence_length, vocab_size).values())}


def main_forward_flops(model: ModelConfig, sequence_length: int, vocab_size: int) -> dict[str, float]:
    """`forward_flops` of the model without its MTP modules."""
    model = model.resolved()
    macs = {part: 0.0 for part in PARTS if part not in (EMBEDDING, NORMS, MTP)}
    macs[HEAD] = model.hidden_size * vocab_size
    for is_moe, count in layer_kinds(model):
        for part, of_layer in _layer_macs(model, is_moe, sequence_length).items():
            macs[part] += count * of_layer
    return {part: 2.0 * count for part, count in macs.items()}


def mtp_forward_flops(model: ModelConfig, sequence_length: int, vocab_size: int) -> dict[str, float]:
    """Forward FLOPs per token of all MTP modules by part; the projection that joins the two halves stands as `mtp`."""
    model = model.resolved()
    macs: dict[str, float] = {}
    for depth in range(1, model.mtp_depth + 1):
        positions = max(0, sequence_length - depth)
        of_module = _layer_macs(model, model.moe is not None, positions)
        of_module |= {MTP: 2.0 * model.hidden_size**2, HEAD: model.hidden_size * vocab_size}
        for part, count in of_module.items():
            macs[part] = macs.get(part, 0.0) + count * positions / sequence_length
    return {part: 2.0 * count for part, count in macs.items()}


def training_flops_per_token(model: ModelConfig, sequence_length: int, vocab_size: int) -> float:
    """FLOPs of forward and backward for one trained token: 3 x forward."""
    return 3 * sum(forward_flops(model, sequence_length, vocab_size).values())


def recomputed_flops_per_token(model: ModelConfig, sequence_length: int, vocab_size: int) -> float:
    """What activation checkpointing does a second time: the forward pass of every block, not of the heads.

    The hardware does it and the model does not ask for it, so it is never part of `training_flops_per_token`.
    """
    once = (f(model, sequence_length, vocab_size) for f in (main_forward_flops, mtp_forward_flops))
    return sum(count for parts in once for part, count in parts.items() if part != HEAD)


def main_parameters(model: ModelConfig, vocab_size: int) -> dict[str, int]:
    """Parameters by part of the model that predicts the next token; a tied head is counted as the embedding."""
    model = model.resolved()
    parts = {EMBEDDING: vocab_size * model.hidden_size, NORMS: model.hidden_size}  # the final norm
    for is_moe, count in layer_kinds(model):
        for part, of_layer in layer_parameters(model, is_moe).items():
            parts[part] = parts.get(part, 0) + count * of_layer
    parts[HEAD] = 0 if model.tie_word_embeddings else vocab_size * model.hidden_size
    return parts


def mtp_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters of all MTP modules by part; the projection that joins the two halves stands as `mtp`."""
    model = model.resolved()
    if model.mtp is None:
        return {}
    of_module = layer_parameters(model, model.moe is not None)
    of_module[NORMS] += 3 * model.hidden_size  # of the embedding, of the hidden state, and the final one
    of_module[MTP] = 2 * model.hidden_size * model.hidden_size
    return {part: model.mtp.depth * count for part, count in of_module.items()}


def parameter_counts(model: ModelConfig, vocab_size: int) -> ParameterCounts:
    """Parameters of the built model: norms included, a tied head once; the selection bias is a buffer, not a parameter.

    The input embedding counts as active.
    """
    main = main_parameters(model, vocab_size)
    mtp = sum(mtp_parameters(model).values())
    total = sum(main.values())
    unvisited = 0.0
    if (moe := model.resolved().moe) is not None:
        unvisited = main[ROUTED_EXPERTS] * (1 - moe.experts_per_token / moe.num_experts)
    return ParameterCounts(total + mtp, total - round(unvisited), mtp)
