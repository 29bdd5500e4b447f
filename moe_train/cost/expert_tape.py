"""Which tensors an MoE layer makes, keeps and lets go, forward and backward, as `model/experts.py` runs it.

Experts are taken to be evenly loaded. Spread over devices, as many rows come in as go out, and exist on both sides of
an exchange at once.
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
    """Ends with its output in the workspace; keeps the norm's result, which the router reads in FP32."""
    tape, c, hidden, width = layer.tape, layer.c, layer.model.hidden_size, moe.moe_intermediate_size
    layout, rows = layer.given.layout, _rows(layer, moe)
    scores = FP32 * layer.tokens * moe.num_experts
    tape.make(WORKSPACE, scores)  # logits
    tape.make(ACTIVATIONS, scores * _kept_scores(moe))
    if moe.capacity_factor is not None and moe.routing == "token_choice":  # who came before, in whole numbers
        tape.passing(WORKSPACE, 2 * INT64 * layer.tokens * moe.top_k * moe.num_experts)
    tape.make(ACTIVATIONS, INT64 * 3 * rows)  # pairs, places, experts
    exchanged = c * rows * hidden if layout.expert_parallel > 1 else 0
    # Rows of tokens: read by the product as they are in FP32, through a form of its own else.
    tape.make(WORKSPACE, FP32 * rows * hidden if layer.given.own_inputs else 0)
    tape.make(ACTIVATIONS, layer.product_input(hidden, rows))
    tape.passing(WORKSPACE, exchanged)
    experts = moe.num_experts * width * hidden // layout.expert_parallel
    layer.weight_cast(3 * experts)
    layer.gated_forward(c * rows * width)
    tape.make(WORKSPACE, c * rows * hidden)
    tape.drop(WORKSPACE, c * rows * width)
    tape.passing(WORKSPACE, exchanged)
    if layer.given.own_inputs:
        tape.drop(WORKSPACE, FP32 * rows * hidden)
    if moe.capacity_factor is None:
        tape.make(WORKSPACE, c * rows * hidden)  # back in the order of tokens
        tape.make(WORKSPACE, layer.narrowed)
        tape.drop(WORKSPACE, 2 * c * rows * hidden)
    else:  # summed in FP32, from zeros; autograd keeps what is summed
        tape.make(ACTIVATIONS, FP32 * rows * hidden)
        if not layer.given.narrow:  # that is the experts' own result
            tape.drop(WORKSPACE, c * rows * hidden)
        tape.passing(WORKSPACE, 2 * layer.residual)
        if layer.given.narrow:
            tape.drop(WORKSPACE, c * rows * hidden)
        tape.make(WORKSPACE, layer.narrowed)
    if moe.num_shared_experts:
        layer.swiglu_forward(moe.num_shared_experts * width)
        tape.passing(WORKSPACE, layer.narrowed)
        tape.drop(WORKSPACE, layer.narrowed)
    tape.drop(WORKSPACE, scores)


def _kept_scores(moe: MoEConfig) -> int:
    return 2 if moe.batch_loss_weight or moe.router_z_loss_weight else 1


def moe_backward(layer: LayerTape, moe: MoEConfig) -> None:
    """From the gradient of the residual stream; leaves that of the norm's result beside it."""
    tape, c, hidden, width = layer.tape, layer.c, layer.model.hidden_size, moe.moe_intermediate_size
    layout, rows = layer.given.layout, _rows(layer, moe)
    experts = moe.num_experts * width * hidden // layout.expert_parallel
    part, across = c * rows * width, c * rows * hidden
    if moe.num_shared_experts:
        layer.swiglu_backward(moe.num_shared_experts * width)
        layer.cast_back()
    if layer.given.narrow:
        tape.make(WORKSPACE, layer.narrowed)
    if moe.capacity_factor is None:
        tape.make(WORKSPACE, across)  # a token's gradient, for each of its experts
    elif layer.given.narrow:
        tape.make(WORKSPACE, layer.residual)
        tape.make(WORKSPACE, FP32 * rows * hidden)
    tape.make(WORKSPACE, across)  # the same in the order of experts
    if moe.capacity_factor is None:
        tape.drop(WORKSPACE, across)
    elif layer.given.narrow:
        tape.drop(WORKSPACE, layer.residual + FP32 * rows * hidden)
    if moe.capacity_factor is not None:
        tape.drop(ACTIVATIONS, FP32 * rows * hidden)
    if layer.given.narrow:
        tape.drop(WORKSPACE, layer.narrowed)
    share = layout.expert_share // layout.expert_parallel
    layer.gated_backward(part, experts, share)
    tape.make(WORKSPACE, across)
    if layout.expert_parallel > 1:
        tape.passing(WORKSPACE, across)  # the side of the exchange that sends
    tape.drop(WORKSPACE, 2 * part + across)
    tape.drop(ACTIVATIONS, layer.kept_gate_up(part))
    tape.drop(ACTIVATIONS, layer.product_input(hidden, rows))
    layer.gated_weights(experts, share)
    if layer.given.narrow:
        tape.make(WORKSPACE, FP32 * rows * hidden)
        tape.drop(WORKSPACE, across)
    if moe.capacity_factor is None:
        tape.passing(WORKSPACE, FP32 * rows * hidden + layer.residual)  # in the order of tokens, and summed
    else:
        tape.passing(WORKSPACE, 2 * layer.residual)
    tape.drop(WORKSPACE, FP32 * rows * hidden)
    tape.make(WORKSPACE, layer.residual)
    if moe.num_shared_experts:
        layer.summed()
    tape.drop(ACTIVATIONS, FP32 * layer.tokens * moe.num_experts * _kept_scores(moe) + INT64 * 3 * rows)
    tape.make(WORKSPACE, layer.residual)  # through the router
    layer.weight_gradient(moe.num_experts * hidden, cast=False)
    tape.drop(ACTIVATIONS, layer.residual)
    layer.summed()
