"""Which tensors an MoE layer makes, keeps and lets go, forward and backward, as `model/experts.py` runs it.

torch's operations copy a token's row once for every expert, multiply, and sum the rows; kernels read rows by an index.
Experts are taken to be evenly loaded. Spread over devices, as many rows come in as go out, and exist on both sides of
an exchange at once; shared experts are computed while rows travel towards routed ones, otherwise after these.
"""

from __future__ import annotations

from moe_train.config import MoEConfig
from moe_train.cost.layer_tape import FP32, INT64, LayerTape
from moe_train.cost.swiglu_tape import SwiGLUTape, swiglu_backward, swiglu_forward
from moe_train.cost.tape import ACTIVATIONS, WORKSPACE


def _rows(layer: LayerTape, moe: MoEConfig) -> float:
    """Rows of the grouped products: pairs of token and expert, or places whether filled or not."""
    if moe.capacity_factor is None:
        return layer.tokens * moe.top_k
    return layer.tokens * min(moe.capacity_factor * moe.top_k, moe.num_experts)


def _by_index(layer: LayerTape, moe: MoEConfig) -> bool:
    """Whether experts read rows of tokens where they are."""
    return layer.given.reads_rows_by_index and moe.capacity_factor is None


def _routed(layer: LayerTape, moe: MoEConfig) -> SwiGLUTape:
    layout, width = layer.given.layout, moe.moe_intermediate_size
    weights = moe.num_experts * width * layer.model.hidden_size // layout.expert_parallel
    share = layout.expert_share // layout.expert_parallel
    return SwiGLUTape(layer, _rows(layer, moe), width, weights, share, routed=True, by_index=_by_index(layer, moe))


def moe_forward(layer: LayerTape, moe: MoEConfig) -> None:
    """From the norm's result to the layer's output in the workspace."""
    tape, hidden = layer.tape, layer.model.hidden_size
    shared = moe.num_shared_experts * moe.moe_intermediate_size
    layout, rows, routed = layer.given.layout, _rows(layer, moe), _routed(layer, moe)
    across = layer.c * rows * hidden
    if not layer.remakes:  # kept for the router, which reads it in FP32
        tape.drop(WORKSPACE, layer.residual)
        tape.make(ACTIVATIONS, layer.residual)
    logits = 0 if _chosen_by_kernel(layer, moe) else FP32 * layer.tokens * moe.num_experts
    tape.make(WORKSPACE, logits)
    tape.make(ACTIVATIONS, _kept_scores(layer, moe))
    if moe.capacity_factor is not None and moe.routing == "token_choice":  # who came before, in whole numbers
        tape.passing(WORKSPACE, 2 * INT64 * layer.tokens * moe.top_k * moe.num_experts)
    tape.make(ACTIVATIONS, INT64 * 3 * rows)  # pairs, tokens, places
    narrowed = layer.narrowed if layer.given.narrow and (shared or routed.by_index) else 0
    tape.make(layer.kept, narrowed)
    copied = 0 if routed.by_index else across
    tape.make(layer.kept, copied)  # rows of tokens
    if layer.keeps_fp8_inputs:
        tape.make(ACTIVATIONS, layer.product_input(hidden, layer.tokens if routed.by_index else rows))
    exchanged = across if layout.expert_parallel > 1 else 0
    tape.make(WORKSPACE, exchanged)
    shared_first = exchanged or (routed.by_index and layer.given.adds_to_routed)  # whose sum with the rest is one visit
    if shared and shared_first:
        swiglu_forward(layer, shared)
    tape.drop(WORKSPACE, exchanged)
    layer.weight_cast(3 * routed.down_weights)
    routed.forward()
    tape.make(WORKSPACE, across)
    routed.leave()
    tape.passing(WORKSPACE, exchanged)
    tape.make(WORKSPACE, layer.narrowed)  # summed by tokens
    tape.drop(WORKSPACE, across)
    if layer.kept == WORKSPACE:
        tape.drop(WORKSPACE, copied)
    if shared:
        if not shared_first:
            swiglu_forward(layer, shared)
        if exchanged or not shared_first:
            tape.passing(WORKSPACE, layer.narrowed)
        tape.drop(WORKSPACE, layer.narrowed)
    if layer.kept == WORKSPACE:
        tape.drop(WORKSPACE, narrowed)
    tape.drop(WORKSPACE, logits)
    if layer.remakes:
        tape.drop(WORKSPACE, layer.residual)


def _chosen_by_kernel(layer: LayerTape, moe: MoEConfig) -> bool:
    """Whether experts are chosen from logits in one visit, which keeps these and makes no scores (model/router.py)."""
    plain = moe.scoring_func == "sigmoid" and moe.topk_group == moe.n_group and not moe.batch_loss_weight
    return plain and moe.routing == "token_choice" and not layer.given.torch


def _kept_scores(layer: LayerTape, moe: MoEConfig) -> int:
    """Bytes of logits and scores that are kept."""
    both = (moe.batch_loss_weight or moe.router_z_loss_weight) and not _chosen_by_kernel(layer, moe)
    return FP32 * layer.tokens * moe.num_experts * (2 if both else 1)


def moe_backward(layer: LayerTape, moe: MoEConfig) -> None:
    """From the gradient of the residual stream; leaves those of the norm's result beside it.

    They are one, or where norms are fused two: as products read it, and in FP32 for the router.
    """
    tape, hidden = layer.tape, layer.model.hidden_size
    shared = moe.num_shared_experts * moe.moe_intermediate_size
    layout, rows, routed = layer.given.layout, _rows(layer, moe), _routed(layer, moe)
    across = layer.c * rows * hidden
    narrow, remakes = layer.given.narrow, layer.remakes
    narrowed = layer.narrowed if narrow else 0
    spread = layout.expert_parallel > 1
    routed_first = spread or (routed.by_index and layer.given.adds_to_routed)
    layer.enter_branch_backward()
    if remakes:  # the norm's result, for products and the router
        tape.make(WORKSPACE, layer.residual + narrowed)
    if shared and not routed_first:
        swiglu_backward(layer, shared, beside_routed=True)
    spread_out = 0 if routed.by_index else across
    tape.make(WORKSPACE, spread_out)  # a token's gradient, for each of its experts
    if not routed.by_index:
        tape.drop(WORKSPACE, narrowed)
    if remakes:
        tape.make(WORKSPACE, spread_out)  # rows of tokens again
    routed.backward()
    tape.make(WORKSPACE, across)
    tape.drop(WORKSPACE, spread_out)
    routed.leave_backward()
    if layer.keeps_fp8_inputs:
        tape.drop(ACTIVATIONS, layer.product_input(hidden, layer.tokens if routed.by_index else rows))
    else:
        tape.drop(layer.kept, spread_out)
    routed.weights_backward()
    if spread:
        tape.make(WORKSPACE, across)  # the side of the exchange that sends
        if shared:
            swiglu_backward(layer, shared, beside_routed=True)
        tape.drop(WORKSPACE, across)
    tape.make(WORKSPACE, layer.narrowed)  # by tokens
    tape.drop(WORKSPACE, across)
    if shared and routed_first and not spread:
        swiglu_backward(layer, shared, beside_routed=True)
    if routed.by_index:
        tape.drop(WORKSPACE, narrowed)
    if shared:
        layer.summed(narrow=True)
    if remakes or (narrowed and layer.given.fp8 is None and (shared or routed.by_index)):
        tape.drop(layer.kept, narrowed)
    layer.cast_back()
    tape.drop(ACTIVATIONS, _kept_scores(layer, moe) + INT64 * 3 * rows)
    tape.make(WORKSPACE, layer.residual)  # through the router
    layer.weight_gradient(moe.num_experts * hidden, cast=False)
    tape.drop(WORKSPACE if remakes else ACTIVATIONS, layer.residual)
    if not layer.given.fuses_norms:
        layer.summed()
