"""Which tensors attention makes, keeps and lets go, forward and backward, as `model/attention.py` runs it.

No score matrix exists. The fused kernel keeps queries, keys, values, its result and a log-sum-exp a row; on a CPU in
BF16 the log-sum-exps are made again (`model/cpu_attention.py`). How heads come to be and go differs:

    torch's operations   queries, and keys again, are joined by heads, as is the result, which the projection has copied
    Triton's kernels     the same made in one visit, stored by tokens, so that the result is what the projection reads
    kernels in C         projections are read where they lie, and nothing else is made of them
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
    joins = not layer.given.compiled
    if isinstance(a, MLAConfig):
        queries = c * tokens * heads * a.qk_head_dim
        turned = 0 if layer.given.triton else c * tokens * heads * a.qk_rope_head_dim
        passing = queries + turned if joins else 0
        _query_forward(layer, a)
        tape.make(WORKSPACE if joins else ACTIVATIONS, queries)
        tape.make(WORKSPACE, turned if joins else 0)
        layer.cast_in(hidden)
        layer.weight_cast(hidden * (a.kv_lora_rank + a.qk_rope_head_dim))
        tape.make(ACTIVATIONS, _entering(layer, a))
        layer.norm_forward(a.kv_lora_rank)
        layer.enter_products(a.kv_lora_rank)
        layer.cast_in(a.kv_lora_rank)
        layer.weight_cast(a.kv_lora_rank * heads * (a.qk_nope_head_dim + a.v_head_dim))
        tape.make(ACTIVATIONS, c * tokens * heads * (a.qk_nope_head_dim + a.v_head_dim))
        if joins:
            tape.make(ACTIVATIONS, _turned_key(layer, a))
            tape.make(WORKSPACE if layer.remakes else ACTIVATIONS, queries)  # keys, joined
            tape.make(ACTIVATIONS, queries)
        mixed = c * tokens * heads * a.v_head_dim
    else:
        queries, keys = (c * tokens * n * a.head_dim for n in (heads, a.num_key_value_heads))
        for features in (heads, a.num_key_value_heads, a.num_key_value_heads):
            layer.cast_in(hidden)
            layer.weight_cast(hidden * features * a.head_dim)
        if a.qk_norm is not None:
            for features in (heads * a.head_dim, a.num_key_value_heads * a.head_dim):
                layer.norm_forward(features, copied=True, exact=True)  # in FP32 not copied, but kept
                tape.drop(WORKSPACE, FP32 * tokens * features)  # turned by position, then no longer needed
        passing = queries + keys if layer.given.triton else 0  # as projections made them
        tape.make(WORKSPACE, passing)
        tape.make(ACTIVATIONS, queries + 2 * keys)
        mixed = queries
    tape.make(ACTIVATIONS, mixed + _log_sum_exps(layer, heads))
    if isinstance(a, MLAConfig) and layer.remakes and joins:
        tape.drop(WORKSPACE, queries)
    by_token = mixed if _by_heads(layer) else 0
    tape.make(layer.kept, by_token)
    tape.make(ACTIVATIONS, _fp8_by_token(layer))
    layer.weight_cast(hidden * _mixed_features(a))
    tape.make(WORKSPACE, layer.narrowed)
    tape.drop(WORKSPACE, passing)
    if isinstance(a, MLAConfig):
        layer.leave_products(a.kv_lora_rank)
    if layer.kept == WORKSPACE:
        tape.drop(WORKSPACE, by_token)


def _entering(layer: LayerTape, a: MLAConfig) -> int:
    """Bytes of the latent and the rotary key as a projection makes them."""
    return layer.c * layer.tokens * (a.kv_lora_rank + a.qk_rope_head_dim)


def _turned_key(layer: LayerTape, a: MLAConfig) -> int:
    """Bytes of a rotary key that was turned, from which keys are made again; Triton's kernel turns it again as well."""
    return layer.c * layer.tokens * a.qk_rope_head_dim if layer.remakes and not layer.given.triton else 0


def _by_heads(layer: LayerTape) -> bool:
    """Whether the kernel's result is stored by heads, as joined queries are, and copied for the projection."""
    if layer.given.compiled or layer.given.triton:
        return False
    return layer.given.narrow or isinstance(layer.model.attention, MLAConfig)


def _log_sum_exps(layer: LayerTape, heads: int) -> int:
    """Bytes."""
    return 0 if layer.given.narrow and not layer.given.triton else FP32 * layer.tokens * heads


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
    heads, joins = a.num_attention_heads, not layer.given.compiled
    if isinstance(a, MLAConfig):
        queries = keys = c * tokens * heads * a.qk_head_dim
        mixed = values = c * tokens * heads * a.v_head_dim
        kept = queries + c * tokens * heads * (a.qk_nope_head_dim + a.v_head_dim)
        if joins:
            kept += _turned_key(layer, a) if layer.remakes else keys
    else:
        queries, keys = (c * tokens * n * a.head_dim for n in (heads, a.num_key_value_heads))
        mixed, values, kept = queries, keys, queries + 2 * keys
    layer.enter_branch_backward()
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
    if isinstance(a, MLAConfig) and not joins:  # of the rotary key that heads share, each head's is summed in FP32
        tape.passing(WORKSPACE, FP32 * tokens * heads * a.qk_rope_head_dim)
    keys_again = keys if layer.remakes and isinstance(a, MLAConfig) and joins else 0
    tape.make(WORKSPACE, keys_again)
    tape.make(WORKSPACE, queries + keys + values)
    tape.drop(WORKSPACE, mixed + keys_again)
    tape.drop(ACTIVATIONS, kept + mixed + _log_sum_exps(layer, heads))
    if isinstance(a, MLAConfig):
        _latent_backward(layer, a, keys + values, queries)
        _query_backward(layer, a, queries)
        layer.summed(narrow=True)
    else:
        _projections_backward(layer, a, queries, keys)
    layer.leave_products_backward(hidden)


def _latent_backward(layer: LayerTape, a: MLAConfig, of_heads: int, queries: int) -> None:
    """From the gradients of keys and values `of_heads`, and of `queries`; these are the projection's own afterwards."""
    tape, tokens, c, hidden = layer.tape, layer.tokens, layer.c, layer.model.hidden_size
    both = a.num_attention_heads * (a.qk_nope_head_dim + a.v_head_dim)
    latent = a.kv_lora_rank
    at_once = queries if layer.given.triton else 0  # queries go with them
    tape.make(WORKSPACE, c * tokens * both + at_once)
    tape.drop(WORKSPACE, of_heads + at_once)
    if layer.given.torch:
        tape.passing(WORKSPACE, c * tokens * both)  # by tokens
    layer.enter_products_backward(latent)
    tape.make(WORKSPACE, c * tokens * latent)
    layer.weight_gradient(latent * both)
    tape.drop(WORKSPACE, c * tokens * both)
    _normed_product_backward(layer, latent, last=False)
    entering = _entering(layer, a)
    tape.make(WORKSPACE, entering)
    tape.drop(WORKSPACE, c * tokens * latent)
    layer.enter_products_backward(hidden)
    tape.make(WORKSPACE, layer.narrowed)
    layer.weight_gradient(hidden * (latent + a.qk_rope_head_dim))
    tape.drop(WORKSPACE, entering)
    layer.let_input_go(hidden)
    tape.drop(ACTIVATIONS, entering)


def _normed_product_backward(layer: LayerTape, features: int, *, last: bool = True) -> None:
    """From the gradient of a norm's result, as the product has it, to that of the norm's input, as it came.

    `last`: the input is kept for this alone, and goes.
    """
    tape, wide, own = layer.tape, FP32 * layer.tokens * features, layer.c * layer.tokens * features
    layer.let_input_go(features)  # what the product read
    layer.leave_products_backward(features)
    if layer.given.fuses_norms:
        tape.passing(WORKSPACE, own)
        tape.drop(ACTIVATIONS, own if last else 0)
        return
    if layer.given.narrow:
        tape.make(WORKSPACE, wide)
        tape.drop(WORKSPACE, own)
    layer.norm_backward(features, copied=last, last=last)
    if layer.given.narrow:
        tape.make(WORKSPACE, own)
        tape.drop(WORKSPACE, wide)


def _query_backward(layer: LayerTape, a: MLAConfig, queries: int) -> None:
    tape, tokens, c, hidden = layer.tape, layer.tokens, layer.c, layer.model.hidden_size
    wide = a.num_attention_heads * a.qk_head_dim
    if layer.given.torch:
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
    turned = layer.given.torch or (layer.given.compiled and a.qk_norm is not None)
    if layer.given.triton:  # both at once
        layer.tape.passing(WORKSPACE, queries + keys)
    for size, heads in ((keys, groups), (queries, a.num_attention_heads)):
        if turned:
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
