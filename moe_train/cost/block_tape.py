"""Which tensors a block makes, keeps and lets go, forward and backward, as `model/block.py` runs it."""

from __future__ import annotations

from moe_train.config import MoEConfig
from moe_train.cost.attention_tape import attention_backward, attention_forward
from moe_train.cost.expert_tape import moe_backward, moe_forward
from moe_train.cost.layer_tape import LayerTape
from moe_train.cost.tape import ACTIVATIONS, WORKSPACE


def block_forward(layer: LayerTape, moe: MoEConfig | None, *, again: bool = False) -> None:
    """`again`: made anew from the block's input, as far as the backward pass needs it."""
    layer.norm_forward(layer.model.hidden_size)
    attention_forward(layer)
    if layer.given.own_inputs:  # which products read
        layer.tape.drop(ACTIVATIONS, layer.residual)
    layer.tape.make(ACTIVATIONS, layer.residual)
    layer.tape.drop(WORKSPACE, layer.narrowed)
    layer.norm_forward(layer.model.hidden_size)
    if moe is None:
        layer.swiglu_forward(layer.model.intermediate_size)
    else:
        moe_forward(layer, moe)
    if not again:
        layer.tape.make(ACTIVATIONS, layer.residual)
    layer.tape.drop(WORKSPACE, layer.narrowed)
    if layer.given.own_inputs and moe is None:
        layer.tape.drop(ACTIVATIONS, layer.residual)


def block_backward(layer: LayerTape, moe: MoEConfig | None) -> None:
    """From the gradient of its output to that of its input, one residual of workspace each."""
    if moe is None:
        layer.swiglu_backward(layer.model.intermediate_size)
        layer.cast_back()
        if not layer.given.own_inputs:
            layer.tape.drop(ACTIVATIONS, layer.residual)
    else:
        moe_backward(layer, moe)
    layer.norm_backward(layer.model.hidden_size, added=True)
    attention_backward(layer)
    if not layer.given.own_inputs:
        layer.tape.drop(ACTIVATIONS, layer.residual)
    layer.norm_backward(layer.model.hidden_size, added=True)
    layer.tape.drop(WORKSPACE, layer.gathered)
    layer.gathered = 0.0
