"""Bytes that pass through a device's memory between products, for a token: norms, heads, SwiGLU, experts' order, casts.

Each kernel is taken to read what it needs once and to write what it makes once, in BF16. The backward pass computes
again, as DeepSeek-V3's does (arXiv 2412.19437, section 3.2.3), norms, SwiGLU and what MLA's up-projections make. With
FP8 (sections 3.3 and 3.5.2) every operand of a product is read in BF16 and written in FP8: inputs along their width
going forward and along the tokens for weight gradients, gradients both ways; SwiGLU's inputs are kept in FP8.
"""

from __future__ import annotations

from moe_train.config import MLAConfig, ModelConfig
from moe_train.forecast.passes import Passes

CAST = 3  # bytes: a number read in BF16 and written in FP8
TURN = 2  # read in FP8 and written in FP8, scaled along the tokens


def layer_bytes(model: ModelConfig, is_moe: bool, fp8: bool, devices: float) -> Passes:
    """Of one layer. `devices`: those on which a token's experts lie, on average."""
    moe = model.moe if is_moe else None
    visits = 0.0 if moe is None else moe.experts_per_token
    routed = 0.0 if moe is None else visits * moe.moe_intermediate_size
    width = model.intermediate_size if moe is None else moe.num_shared_experts * moe.moe_intermediate_size
    found = _norms(model, is_moe) + _heads(model) + _swiglu(width + routed, fp8)
    found += _experts_order(model.hidden_size, visits, devices, fp8)
    return found + _casts(model, width, routed, visits) if fp8 else found


def loss_bytes(model: ModelConfig, vocab_size: int) -> Passes:
    """Of the cross-entropies: logits read, read again, and their gradient written."""
    heads = 1 + model.mtp_depth
    return Passes(heads * 2.0 * vocab_size, heads * 4.0 * vocab_size)


def _norms(model: ModelConfig, is_moe: bool) -> Passes:
    """Two on the residual stream, which they add to, and MLA's on its latents."""
    hidden, a, moe = model.hidden_size, model.attention, model.moe
    latent = a.kv_lora_rank + (a.q_lora_rank or 0) if isinstance(a, MLAConfig) else 0
    # Outputs of shared and routed experts are added; gradients come back from both and from the router.
    more = 0 if moe is None or not is_moe else 1 if moe.num_shared_experts else 0
    forward = 2 * 8 * hidden + 4 * latent + 2 * hidden * more
    again = 2 * 4 * hidden + 4 * latent
    return Passes(forward, again + 2 * 8 * hidden + 6 * latent + 2 * hidden * (is_moe + more))


def _heads(model: ModelConfig) -> Passes:
    """Queries and keys rotated in place; with MLA keys put together from two parts, both once more for the backward."""
    a = model.attention
    if not isinstance(a, MLAConfig):
        once = 4 * (a.num_attention_heads + a.num_key_value_heads) * a.head_dim
        return Passes(once, once)
    once = a.num_attention_heads * (4 * a.qk_rope_head_dim + 2 * (a.qk_nope_head_dim + a.qk_head_dim))
    return Passes(once, 2 * once)


def _swiglu(width: float, fp8: bool) -> Passes:
    """Backward reads gate, up and the gradient, and writes two gradients and the output once more."""
    return Passes(8 * width, 10 * width) if fp8 else Passes(6 * width, 12 * width)


def _experts_order(hidden: int, visits: float, devices: float, fp8: bool) -> Passes:
    """Rows that arrived put into the experts' order, results summed for each of a token's devices to send back."""
    each = ((1 if fp8 else 2) + 2) * (devices + visits) * hidden * bool(visits)
    return Passes(each, each)


def _casts(model: ModelConfig, width: float, routed: float, visits: float) -> Passes:
    """`width` of the dense or shared FFN, `routed` of a token's experts together.

    What routed experts take in, and gradients of what they give, arrive in FP8; SwiGLU's outputs exist in BF16 again.
    """
    hidden, a = model.hidden_size, model.attention
    if isinstance(a, MLAConfig):
        q, heads = a.q_lora_rank or 0, a.num_attention_heads
        taken = hidden + q + a.kv_lora_rank + heads * a.v_head_dim
        made = q + a.kv_lora_rank + a.qk_rope_head_dim + heads * (a.qk_head_dim + a.qk_nope_head_dim + a.v_head_dim)
    else:
        taken = hidden + a.num_attention_heads * a.head_dim
        made = (a.num_attention_heads + 2 * a.num_key_value_heads) * a.head_dim
    hidden_outputs = 2 * hidden  # of attention and FFN
    inputs, outputs = taken + hidden + width + routed, made + hidden_outputs + 2 * (width + routed)
    arrived = 2 * visits * hidden
    turned = TURN * (inputs + arrived) + (CAST - TURN) * (width + routed) + outputs  # gradients are written twice
    return Passes(CAST * inputs, CAST * outputs, turned)
