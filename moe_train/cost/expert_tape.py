"""Which tensors an MoE layer makes, keeps and lets go, forward and backward, as `model/experts.py` runs it.

Experts are taken to be evenly loaded. Spread over devices, as many rows come in as go out, and exist on both sides of
an exchange at once; shared experts are computed while rows travel towards routed ones, otherwise after these.
"""

from __future__ import annotations

from moe_train.config import MoEConfig
from moe_train.cost.layer_tape import FP32, INT64, LayerTape
from moe_train.cost.tape import ACTIVATIONS, WORKSPACE


def _rows(layer: LayerTape, moe: MoEConfig) -> float:
    """Rows of the grouped products: pairs of token and expert, or places whether filled or not."""
    if moe.capacity_factor is None:
        return layer.tokens * moe.top_k
    return layer.tokens * min(moe.capacity_factor * moe.top_k, moe.num_experts)


def moe_forward(layer: LayerTape, moe: MoEConfig) -> None:
    """From the norm's result to the layer's output in the workspace."""
    tape, c, hidden, width = layer.tape, layer.c, layer.model.hidden_size, moe.moe_intermediate_size
    layout, rows = layer.given.layout, _rows(layer, moe)
    across = c * rows * hidden
    if not layer.remakes:  # kept for the router, which reads it in FP32
        tape.drop(WORKSPACE, layer.residual)
        tape.make(ACTIVATIONS, layer.residual)
    scores = FP32 * layer.tokens * moe.num_experts
    tape.make(WORKSPACE, scores)  # logits
    tape.make(ACTIVATIONS, scores * _kept_scores(moe))
    if moe.capacity_factor is not None and moe.routing == "token_choice":  # who came before, in whole numbers
        tape.passing(WORKSPACE, 2 * INT64 * layer.tokens * moe.top_k * moe.num_experts)
    tape.make(ACTIVATIONS, INT64 * 3 * rows)  # pairs, tokens, places
    narrowed = layer.narrowed if layer.given.narrow else 0
    tape.make(layer.kept, narrowed if moe.num_shared_experts else 0)
    exchanged = across if layout.expert_parallel > 1 else 0
    tape.make(layer.kept, across)  # rows of tokens
    if layer.keeps_fp8_inputs:
        tape.make(ACTIVATIONS, layer.product_input(hidden, rows))
    tape.make(WORKSPACE, exchanged)
    if moe.num_shared_experts and exchanged:
        layer.swiglu_forward(moe.num_shared_experts * width)
    tape.drop(WORKSPACE, exchanged)
    experts = moe.num_experts * width * hidden // layout.expert_parallel
    layer.weight_cast(3 * experts)
    layer.gated_forward(rows, width)
    tape.make(WORKSPACE, across)
    layer.leave_gated(rows, width)
    tape.passing(WORKSPACE, exchanged)
    tape.make(WORKSPACE, layer.narrowed)  # summed by tokens
    tape.drop(WORKSPACE, across)
    if layer.kept == WORKSPACE:
        tape.drop(WORKSPACE, across)
    if moe.num_shared_experts:
        if not exchanged:
            layer.swiglu_forward(moe.num_shared_experts * width)
        tape.passing(WORKSPACE, layer.narrowed)
        tape.drop(WORKSPACE, layer.narrowed)
        if layer.kept == WORKSPACE:
            tape.drop(WORKSPACE, narrowed)
    tape.drop(WORKSPACE, scores)
    if layer.remakes:
        tape.drop(WORKSPACE, layer.residual)


def _kept_scores(moe: MoEConfig) -> int:
    return 2 if moe.batch_loss_weight or moe.router_z_loss_weight else 1


def moe_backward(layer: LayerTape, moe: MoEConfig) -> None:
    """From the gradient of the residual stream; leaves that of the norm's result beside it."""
    tape, c, hidden, width = layer.tape, layer.c, layer.model.hidden_size, moe.moe_intermediate_size
    layout, rows = layer.given.layout, _rows(layer, moe)
    experts = moe.num_experts * width * hidden // layout.expert_parallel
    part, across = c * rows * width, c * rows * hidden
    narrow, remakes = layer.given.narrow, layer.remakes
    narrowed = layer.narrowed if narrow else 0
    if narrow:
        tape.make(WORKSPACE, layer.narrowed)
    if remakes:  # the norm's result, for products and the router
        tape.make(WORKSPACE, layer.residual + narrowed)
    spread = layout.expert_parallel > 1
    if moe.num_shared_experts and not spread:
        layer.swiglu_backward(moe.num_shared_experts * width)
    tape.make(WORKSPACE, across)  # a token's gradient, for each of its experts
    if narrow:
        tape.drop(WORKSPACE, layer.narrowed)
    if remakes:
        tape.make(WORKSPACE, across)  # rows of tokens again
    share = layout.expert_share // layout.expert_parallel
    layer.gated_backward(rows, width, experts, share)
    tape.make(WORKSPACE, across)
    tape.drop(WORKSPACE, 2 * part + across)
    tape.drop(ACTIVATIONS, layer.kept_gate_up(rows, width))
    if layer.keeps_fp8_inputs:
        tape.drop(ACTIVATIONS, layer.product_input(hidden, rows))
    else:
        tape.drop(layer.kept, across)
    layer.gated_weights(experts, share)
    if spread:
        tape.make(WORKSPACE, across)  # the side of the exchange that sends
        if moe.num_shared_experts:
            layer.swiglu_backward(moe.num_shared_experts * width)
        tape.drop(WORKSPACE, across)
    tape.make(WORKSPACE, layer.narrowed)  # by tokens
    tape.drop(WORKSPACE, across)
    if moe.num_shared_experts:
        layer.summed(narrow=True)
    if remakes or (moe.num_shared_experts and layer.given.fp8 is None):
        tape.drop(layer.kept, narrowed)
    layer.cast_back()
    tape.drop(ACTIVATIONS, FP32 * layer.tokens * moe.num_experts * _kept_scores(moe) + INT64 * 3 * rows)
    tape.make(WORKSPACE, layer.residual)  # through the router
    layer.weight_gradient(moe.num_experts * hidden, cast=False)
    tape.drop(WORKSPACE if remakes else ACTIVATIONS, layer.residual)
    layer.summed()
