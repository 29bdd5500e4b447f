"""Which tensors the output head's loss makes, keeps and lets go, as `model/loss.py` runs it.

Logits exist a chunk at a time, and both gradients are made in the same visit. torch's operations widen a chunk's
logits, Triton's kernel writes their gradient over them, and the one in C keeps logits in a core's cache.
"""

from __future__ import annotations

import math

from moe_train.cost.kernels import Kernels
from moe_train.cost.layer_tape import FP32, LayerTape
from moe_train.cost.tape import ACTIVATIONS, HEAD_GRADIENTS, LOSS

# Elements of the logits that are alive at a time (model/loss.py), or of their gradients (kernels/cpu/head.py).
CHUNK_ELEMENTS = {Kernels.TORCH: 2**21, Kernels.COMPILED: 2**22, Kernels.TRITON: 2**26}


def loss_forward(layer: LayerTape, vocab_size: int, *, rounded: bool) -> None:
    """`rounded`: hidden states come in the compute format, and so does the gradient of them that is kept."""
    tape, given = layer.tape, layer.given
    casts = layer.narrowed if given.narrow and not rounded else 0
    tape.make(LOSS, casts)
    tape.make(HEAD_GRADIENTS, FP32 * vocab_size * layer.model.hidden_size)
    if given.compiled:
        tape.make(LOSS, layer.residual)  # the gradient of the hidden states
        tape.passing(LOSS, _packed(layer, vocab_size))
        made = layer.residual
    else:
        tape.make(LOSS, layer.narrowed)
        _chunks(layer, vocab_size)
        made = layer.narrowed
    tape.make(ACTIVATIONS, kept_gradient(layer, rounded=rounded))
    tape.drop(LOSS, casts + made)


def kept_gradient(layer: LayerTape, *, rounded: bool) -> float:
    """Bytes of the gradient of the hidden states, which the loss keeps for its backward pass."""
    return layer.narrowed if rounded else layer.residual


def _packed(layer: LayerTape, vocab_size: int) -> float:
    """Bytes beside the results of the kernel in C: the weight twice; of two chunks hidden states and gradients."""
    hidden = layer.model.hidden_size
    chunks = max(1, math.ceil(layer.tokens * vocab_size / CHUNK_ELEMENTS[Kernels.COMPILED]))
    return 2 * layer.c * (vocab_size * hidden + layer.tokens / chunks * (vocab_size + hidden))


def _chunks(layer: LayerTape, vocab_size: int) -> None:
    """With torch's products; the names of one chunk live into the next."""
    tape, given, c, head = layer.tape, layer.given, layer.c, vocab_size * layer.model.hidden_size
    kernels = Kernels.TRITON if given.triton else Kernels.TORCH
    rows = min(layer.tokens, max(1, CHUNK_ELEMENTS[kernels] // vocab_size))
    several = layer.tokens > rows
    own, wide = c * rows * vocab_size, FP32 * rows * vocab_size
    cast = c * head if given.narrow else 0
    tape.make(LOSS, cast)
    if given.triton:
        tape.make(LOSS, own * (2 if several else 1))
        left, product = own * (2 if several else 1), FP32 * head
    elif given.narrow:
        tape.make(LOSS, wide + own if several else 0)
        tape.passing(LOSS, own + wide)
        tape.make(LOSS, wide)
        tape.drop(LOSS, wide if several else 0)
        tape.passing(LOSS, wide)  # exponentials, within the log-sum-exp
        tape.drop(LOSS, own if several else 0)
        tape.make(LOSS, own)  # the gradient
        left, product = wide + own, c * head
    else:
        tape.make(LOSS, wide * (2 if several else 1))
        tape.passing(LOSS, wide)
        tape.drop(LOSS, wide if several else 0)
        left, product = wide, c * head
    tape.passing(LOSS, product)  # that is added to the head's gradient
    tape.drop(LOSS, left + cast)
