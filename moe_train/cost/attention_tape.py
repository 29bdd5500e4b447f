"""Which tensors attention makes, keeps and lets go, forward and backward, as `model/attention.py` runs it.

The fused kernel keeps queries, keys, values, its result and a log-sum-exp a row; no score matrix exists. On a CPU in
BF16 the log-sum-exps are made again, and the result is stored by heads (`model/cpu_attention.py`). The kernel in C
needs less: no queries or keys joined, no result by heads (`kernels/cpu/attention.py`); foreseen is the former.
"""

from __future__ import annotations

from moe_train.config import GQAConfig, MLAConfig
from moe_train.cost.layer_tape import FP32, LayerTape
from moe_train.cost.tape import ACTIVATIONS, WORKSPACE


def attention_forward(layer: LayerTape) -> None:
    """Ends with the projection's output in the workspace."""
    tape, tokens, c, hidden = layer.tape, layer.tokens, layer.c, layer.model.hidden_size
    a = layer.model.attention
    heads = a.num_attention_heads
    if isinstance(a, MLAConfig):
        queries = c * tokens * heads * a.qk_head_dim
        passing = queries + c * tokens * heads * a.qk_rope_head_dim
        _query_forward(layer, a)
        tape.make(WORKSPACE, passing)
        layer.cast_in(hidden)
        layer.weight_cast(hidden * (a.kv_lora_rank + a.qk_rope_head_dim))
        tape.make(_entering_part(layer), _entering(layer, a))
        layer.norm_forward(a.kv_lora_rank, copied=_copies_latent(layer))
        layer.enter_products(a.kv_lora_rank)
        layer.cast_in(a.kv_lora_rank)
        layer.weight_cast(a.kv_lora_rank * heads * (a.qk_nope_head_dim + a.v_head_dim))
        tape.make(ACTIVATIONS, c * tokens * heads * (a.qk_nope_head_dim + a.v_head_dim))
        tape.make(ACTIVATIONS, c * tokens * a.qk_rope_head_dim if layer.remakes else 0)
        tape.make(WORKSPACE if layer.remakes else ACTIVATIONS, queries)  # keys, joined
        tape.make(ACTIVATIONS, queries)
        mixed = c * tokens * heads * a.v_head_dim
    else:
        passing = 0
        queries, keys = (c * tokens * n * a.head_dim for n in (heads, a.num_key_value_heads))
        for features in (heads, a.num_key_value_heads, a.num_key_value_heads):
            layer.cast_in(hidden)
            layer.weight_cast(hidden * features * a.head_dim)
        if a.qk_norm is not None:
            for features in (heads * a.head_dim, a.num_key_value_heads * a.head_dim):
                layer.norm_forward(features, copied=True)  # in FP32 not copied, but kept
                tape.drop(WORKSPACE, FP32 * tokens * features)  # turned by position, then no longer needed
        tape.make(ACTIVATIONS, queries + 2 * keys)
        mixed = queries
    tape.make(ACTIVATIONS, mixed + _log_sum_exps(layer, heads))
    if isinstance(a, MLAConfig) and layer.remakes:
        tape.drop(WORKSPACE, queries)
    by_token = mixed if _by_heads(layer) else 0
    tape.make(layer.kept, by_token)
    tape.make(ACTIVATIONS, _fp8_by_token(layer))
    layer.weight_cast(hidden * _mixed_features(a))
    tape.make(WORKSPACE, layer.narrowed)
    if isinstance(a, MLAConfig):
        tape.drop(WORKSPACE, passing)
        layer.leave_products(a.kv_lora_rank)
        if _entering_part(layer) == WORKSPACE:
            tape.drop(WORKSPACE, _entering(layer, a))
    if layer.kept == WORKSPACE:
        tape.drop(WORKSPACE, by_token)


def _copies_latent(layer: LayerTape) -> bool:
    """Whether the latent's norm keeps an input of its own: in FP32 it is a view of what the projection made."""
    return layer.given.narrow and layer.given.on_cuda


def _entering(layer: LayerTape, a: MLAConfig) -> int:
    """Bytes of the latent and the rotary key as a projection makes them."""
    return layer.c * layer.tokens * (a.kv_lora_rank + a.qk_rope_head_dim)


def _entering_part(layer: LayerTape) -> str:
    return WORKSPACE if _copies_latent(layer) else ACTIVATIONS


def _by_heads(layer: LayerTape) -> bool:
    """Whether the kernel's result is stored by heads, as joined queries are, and copied for the projection."""
    return _in_tiles(layer) or (isinstance(layer.model.attention, MLAConfig) and not layer.given.on_cuda)


def _in_tiles(layer: LayerTape) -> bool:
    return layer.given.narrow and not layer.given.on_cuda


def _log_sum_exps(layer: LayerTape, heads: int) -> int:
    """Bytes."""
    return 0 if _in_tiles(layer) else FP32 * layer.tokens * heads


def _fp8_by_token(layer: LayerTape) -> float:
    """Bytes of what the last projection keeps in FP8."""
    return layer.product_input(_mixed_features(layer.model.attention)) if layer.keeps_fp8_inputs else 0


def _mixed_features(a: MLAConfig | GQAConfig) -> int:
    """Of the values of all heads, which the last projection reads."""
    return a.num_attention_heads * (a.v_head_dim if isinstance(a, MLAConfig) else a.head_dim)


def _query_forward(layer: LayerTape, a: MLAConfig) -> None:
    hidden, wide = layer.model.hidden_size, a.num_attention_heads * a.qk_head_dim
    layer.cast_in(hidden)
    if a.q_lora_rank is None:
        layer.weight_cast(hidden * wide)
        return
    layer.weight_cast(hidden * a.q_lora_rank)
    layer.norm_forward(a.q_lora_rank, copied=True)
    layer.enter_products(a.q_lora_rank)
    layer.cast_in(a.q_lora_rank)
    layer.weight_cast(a.q_lora_rank * wide)
    layer.leave_products(a.q_lora_rank)


def attention_backward(layer: LayerTape) -> None:
    """Leaves the gradient of the norm's result, as products read it, beside that of the residual stream."""
    tape, tokens, c, hidden = layer.tape, layer.tokens, layer.c, layer.model.hidden_size
    a = layer.model.attention
    heads = a.num_attention_heads
    if isinstance(a, MLAConfig):
        queries = keys = c * tokens * heads * a.qk_head_dim
        mixed = values = c * tokens * heads * a.v_head_dim
        kept = queries + c * tokens * heads * (a.qk_nope_head_dim + a.v_head_dim)
        kept += c * tokens * a.qk_rope_head_dim if layer.remakes else keys
    else:
        queries, keys = (c * tokens * n * a.head_dim for n in (heads, a.num_key_value_heads))
        mixed, values, kept = queries, keys, queries + 2 * keys
    if layer.given.narrow:
        tape.make(WORKSPACE, layer.narrowed)
    tape.make(WORKSPACE, mixed)
    if layer.given.narrow:
        tape.drop(WORKSPACE, layer.narrowed)
    by_token = mixed if _by_heads(layer) else 0
    if layer.remakes:
        tape.make(WORKSPACE, by_token)
    layer.weight_gradient(hidden * _mixed_features(a))
    tape.drop(ACTIVATIONS, _fp8_by_token(layer))
    if layer.remakes or layer.given.fp8 is None:
        tape.drop(layer.kept, by_token)
    keys_again = keys if layer.remakes and isinstance(a, MLAConfig) else 0
    tape.make(WORKSPACE, keys_again)
    tape.make(WORKSPACE, queries + keys + values)
    tape.drop(WORKSPACE, mixed + keys_again)
    tape.drop(ACTIVATIONS, kept + mixed + _log_sum_exps(layer, heads))
    if isinstance(a, MLAConfig):
        _latent_backward(layer, a, keys + values)
        _query_backward(layer, a, queries)
        layer.summed(narrow=True)
    else:
        _projections_backward(layer, a, queries, keys)
    layer.leave_products_backward(hidden)


def _latent_backward(layer: LayerTape, a: MLAConfig, gradients: int) -> None:
    tape, tokens, c, hidden = layer.tape, layer.tokens, layer.c, layer.model.hidden_size
    both = a.num_attention_heads * (a.qk_nope_head_dim + a.v_head_dim)
    latent = a.kv_lora_rank
    tape.make(WORKSPACE, c * tokens * both)
    tape.drop(WORKSPACE, gradients)
    tape.passing(WORKSPACE, c * tokens * both)  # by tokens
    layer.enter_products_backward(latent)
    tape.make(WORKSPACE, c * tokens * latent)
    layer.weight_gradient(latent * both)
    tape.drop(WORKSPACE, c * tokens * both)
    _normed_product_backward(layer, latent, copied=_copies_latent(layer), last=_copies_latent(layer))
    entering = _entering(layer, a)
    tape.make(WORKSPACE, entering)
    tape.drop(WORKSPACE, c * tokens * latent)
    layer.enter_products_backward(hidden)
    tape.make(WORKSPACE, layer.narrowed)
    layer.weight_gradient(hidden * (latent + a.qk_rope_head_dim))
    tape.drop(WORKSPACE, entering)
    layer.let_input_go(hidden)
    if _entering_part(layer) == ACTIVATIONS:
        tape.drop(ACTIVATIONS, entering)


def _normed_product_backward(layer: LayerTape, features: int, *, copied: bool = True, last: bool = True) -> None:
    """From the gradient of a norm's result, as the product has it, to that of the norm's input, as it came."""
    tape, wide, own = layer.tape, FP32 * layer.tokens * features, layer.c * layer.tokens * features
    layer.let_input_go(features)  # what the product read
    layer.leave_products_backward(features)
    if layer.given.narrow:
        tape.make(WORKSPACE, wide)
        tape.drop(WORKSPACE, own)
    layer.norm_backward(features, copied=copied, last=last)
    if layer.given.narrow:
        tape.make(WORKSPACE, own)
        tape.drop(WORKSPACE, wide)


def _query_backward(layer: LayerTape, a: MLAConfig, queries: int) -> None:
    tape, tokens, c, hidden = layer.tape, layer.tokens, layer.c, layer.model.hidden_size
    wide = a.num_attention_heads * a.qk_head_dim
    layer.rotate_backward(a.num_attention_heads * a.qk_rope_head_dim, freed=0)
    tape.passing(WORKSPACE, queries)  # joined with the rest
    tape.drop(WORKSPACE, c * tokens * a.num_attention_heads * a.qk_rope_head_dim)
    tape.passing(WORKSPACE, queries)  # by tokens
    if a.q_lora_rank is not None:
        layer.enter_products_backward(a.q_lora_rank)
        tape.make(WORKSPACE, c * tokens * a.q_lora_rank)
        layer.weight_gradient(a.q_lora_rank * wide)
        tape.drop(WORKSPACE, queries)
        _normed_product_backward(layer, a.q_lora_rank)
        queries, wide = c * tokens * a.q_lora_rank, a.q_lora_rank
    tape.make(WORKSPACE, layer.narrowed)
    layer.weight_gradient(hidden * wide)
    tape.drop(WORKSPACE, queries)
    layer.let_input_go(hidden)


def _projections_backward(layer: LayerTape, a: GQAConfig, queries: int, keys: int) -> None:
    hidden, groups = layer.model.hidden_size, a.num_key_value_heads
    for size, heads in ((keys, groups), (queries, a.num_attention_heads)):
        layer.rotate_backward(heads * a.head_dim, freed=size)
        if a.qk_norm is not None:
            wide = FP32 * layer.tokens * heads * a.head_dim
            layer.tape.make(WORKSPACE, wide)
            layer.norm_backward(heads * a.head_dim, copied=True)
            layer.tape.drop(WORKSPACE, wide)
    layer.enter_products_backward(hidden)
    for nth, (size, heads) in enumerate(((keys, groups), (keys, groups), (queries, a.num_attention_heads))):
        layer.tape.make(WORKSPACE, layer.narrowed)
        layer.weight_gradient(hidden * heads * a.head_dim)
        layer.tape.drop(WORKSPACE, size)
        layer.let_input_go(hidden)
        if nth:
            layer.summed(narrow=True)
