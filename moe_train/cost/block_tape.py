"""Which tensors a block makes, keeps and lets go, forward and backward, as `model/block.py` runs it."""

from __future__ import annotations

from moe_train.config import MoEConfig
from moe_train.cost.attention_tape import attention_backward, attention_forward
from moe_train.cost.expert_tape import moe_backward, moe_forward
from moe_train.cost.layer_tape import LayerTape
from moe_train.cost.swiglu_tape import swiglu_backward, swiglu_forward
from moe_train.cost.tape import ACTIVATIONS, WORKSPACE


def block_forward(layer: LayerTape, moe: MoEConfig | None, *, again: bool = False) -> None:
    """`again`: made anew from the block's input, as far as the backward pass needs it."""
    hidden = layer.model.hidden_size
    layer.norm_forward(hidden)
    layer.enter_products(hidden)
    attention_forward(layer)
    layer.tape.make(ACTIVATIONS, layer.residual)
    layer.tape.drop(WORKSPACE, layer.narrowed)
    layer.leave_products(hidden)
    layer.norm_forward(hidden, exact=moe is not None)
    if moe is None:
        layer.enter_products(hidden)
        swiglu_forward(layer, layer.model.intermediate_size)
    else:
        moe_forward(layer, moe)
    if not again:
        layer.tape.make(ACTIVATIONS, layer.residual)
    layer.tape.drop(WORKSPACE, layer.narrowed)
    if moe is None:
        layer.leave_products(hidden)


def block_backward(layer: LayerTape, moe: MoEConfig | None) -> None:
    """From the gradient of its output to that of its input, one residual of workspace each.

    Where norms are fused, the gradient of what was added to the residual stream is beside it at either end.
    """
    hidden = layer.model.hidden_size
    if moe is None:
        layer.enter_products_backward(hidden)
        swiglu_backward(layer, layer.model.intermediate_size)
        layer.leave_products_backward(hidden)
        layer.cast_back()
    else:
        moe_backward(layer, moe)
    layer.norm_of_sum_backward(exact=moe is not None)
    attention_backward(layer)
    layer.cast_back()
    layer.norm_of_sum_backward()
    layer.tape.drop(WORKSPACE, layer.gathered)
    layer.gathered = 0.0
