"""Which tensors norms, products and SwiGLUs make and let go, forward and backward, as `model/layers.py` runs them.

The order is that of autograd: what was computed last is differentiated first, and what an operation had kept is let go
when its backward is done. Names in a Python frame live until the function returns. Left out is what is below a
percent: masks, scales, indices where rows are, a token's scores where it has experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config import ModelConfig
from moe_train.cost.fp8_operands import Fp8Kept, rows_bytes
from moe_train.cost.layout import Layout
from moe_train.cost.tape import ACTIVATIONS, COPIES, GRADIENTS, WORKSPACE, Tape

FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Circumstances:
    """What a step's tensors depend on beside the model."""

    compute_bytes: int  # of a number in matrix products
    gradients_exist: bool  # from micro-batches before, or in DDP's buckets: a new one is added to them and let go
    on_cuda: bool  # a norm's input is kept in FP32 there; attention's result is stored by tokens
    layout: Layout
    fp8: Fp8Kept | None = None  # linear layers of the blocks multiply in FP8, and keep inputs and weights in it

    @property
    def narrow(self) -> bool:
        return self.compute_bytes < FP32


class LayerTape:
    """Writes the passes of `tokens` tokens through the parts of one layer.

    In the backward pass the gradient of the residual stream stands in the workspace throughout. `remakes`: what is
    cheap is made again there (precision/remade.py), as it is wherever whole layers are not.
    """

    def __init__(
        self, tape: Tape, model: ModelConfig, tokens: int, given: Circumstances, *, remakes: bool = True
    ) -> None:
        self.tape, self.model, self.tokens, self.given, self.remakes = tape, model, tokens, given, remakes
        self.c = given.compute_bytes
        self.residual = FP32 * tokens * model.hidden_size  # bytes of the stream between blocks
        self.narrowed = self.c * tokens * model.hidden_size  # the same in the compute format
        self.gathered = 0.0  # gradients of this layer that are not yet sharded

    @property
    def kept(self) -> str:
        """The part of what a product would keep of a result that can be made again."""
        return WORKSPACE if self.remakes or self.given.fp8 is not None else ACTIVATIONS

    @property
    def keeps_fp8_inputs(self) -> bool:
        return self.given.fp8 is not None and not self.remakes

    def norm_forward(self, features: int, *, copied: bool = False) -> None:
        """`copied`: its input is kept for this alone. The result stands in the workspace."""
        if copied:
            self.tape.make(ACTIVATIONS, self._norm_input(features))
        self.tape.make(WORKSPACE, FP32 * self.tokens * features)

    def _norm_input(self, features: int) -> float:
        """Bytes of an input in the compute format as it is kept; CUDA's kernel takes it in FP32."""
        return (FP32 if self.given.on_cuda else self.c) * self.tokens * features

    def enter_products(self, features: int) -> None:
        """From a norm's result in the workspace: the form of it that products read, once for all of them."""
        wide, own = FP32 * self.tokens * features, self.c * self.tokens * features
        if self.given.narrow:
            self.tape.make(self.kept, own)
        elif self.kept != WORKSPACE:
            self.tape.drop(WORKSPACE, wide)
            self.tape.make(self.kept, wide)

    def leave_products(self, features: int) -> None:
        """The form that products read goes, but for what they keep; the norm's result goes too."""
        wide, own = FP32 * self.tokens * features, self.c * self.tokens * features
        if self.given.narrow or self.kept == WORKSPACE:
            self.tape.drop(WORKSPACE, wide)
        if self.given.narrow and self.kept == WORKSPACE:
            self.tape.drop(WORKSPACE, own)

    def enter_products_backward(self, features: int) -> None:
        """What products read is there again."""
        own = self.c * self.tokens * features
        if self.remakes:
            if self.given.narrow:
                self.tape.make(WORKSPACE, FP32 * self.tokens * features)
            self.tape.make(WORKSPACE, own)
            if self.given.narrow:
                self.tape.drop(WORKSPACE, FP32 * self.tokens * features)

    def leave_products_backward(self, features: int) -> None:
        if self.remakes or self.given.fp8 is None:
            self.tape.drop(self.kept, self.c * self.tokens * features)

    def norm_backward(self, features: int, *, added: bool = False, copied: bool = False, last: bool = True) -> None:
        """From the gradient of the result to that of the input; `added`: to that of the residual stream.

        `copied`: as in the forward pass; `last`: nothing else needs its input, which goes with it.
        """
        tape, size = self.tape, FP32 * self.tokens * features
        if copied and self.given.narrow:
            tape.passing(WORKSPACE, 2 * size)  # the input in FP32
        tape.make(WORKSPACE, size)
        tape.drop(WORKSPACE, size)
        if added:
            tape.make(WORKSPACE, size)
            tape.drop(WORKSPACE, 2 * size)
        if last:
            tape.drop(ACTIVATIONS, self._norm_input(features) if copied else size)

    def cast_in(self, features: int) -> None:
        """A product's own form of its input, which FP8 has; it is made again where the input is."""
        if self.keeps_fp8_inputs:
            self.tape.make(ACTIVATIONS, self.product_input(features))

    def product_input(self, features: int, rows: float | None = None) -> float:
        """Bytes in which a product keeps its input of `rows` rows, those of all tokens if not given."""
        rows = self.tokens if rows is None else rows
        return self.c * rows * features if self.given.fp8 is None else rows_bytes(rows, features)

    def let_input_go(self, features: int) -> None:
        if self.keeps_fp8_inputs:
            self.tape.drop(ACTIVATIONS, self.product_input(features))

    def weight_cast(self, weights: int) -> None:
        """FP8 forms of weights outlive a layer: they are the step's (step_tape)."""
        if self.given.fp8 is not None:
            return
        if self.given.narrow and self.given.layout.shard == 1:  # a gathered one is in the compute format already
            self.tape.make(COPIES, self.c * weights)

    def weight_gradient(self, weights: int, *, share: int | None = None, cast: bool = True, freed: float = 0.0) -> None:
        """A product's gradient of its weight: made in the compute format, kept in FP32.

        `share`: the parts it is cut into, those of the layout if not given. `cast`: the product read a cast of the
        weight; FP8 products make the gradient in FP32 at once. `freed`: bytes of the result's gradient, of no use from
        here on.
        """
        cast = cast and self.given.fp8 is None
        tape, narrow = self.tape, self.given.narrow and cast
        share = share or self.given.layout.shard
        own = (self.c if cast else FP32) * weights
        if share > 1 or narrow:
            tape.make(WORKSPACE, own)
        if share > 1:  # whole until the layer is done, then summed over devices and cut
            self.gathered += round(own)
        if narrow:
            tape.drop(WORKSPACE, freed)
        if not self.given.gradients_exist:
            tape.make(GRADIENTS, FP32 * weights / share)
        elif share == 1:
            tape.passing(WORKSPACE, FP32 * weights)
        if not narrow:
            tape.drop(WORKSPACE, freed)
        elif share == 1:
            tape.drop(WORKSPACE, own)
        if narrow and self.given.layout.shard == 1:
            tape.drop(COPIES, own)

    def cast_back(self) -> None:
        """The gradient of a product's cast input, in FP32 again; FP32 inputs need none."""
        if self.given.narrow:
            self.tape.make(WORKSPACE, self.residual)
            self.tape.drop(WORKSPACE, self.narrowed)

    def summed(self, *, narrow: bool = False) -> None:
        """The gradients of two uses of a norm's result are added; `narrow`: of its form in the compute format."""
        size = self.narrowed if narrow else self.residual
        self.tape.make(WORKSPACE, size)
        self.tape.drop(WORKSPACE, 2 * size)

    def rotate_backward(self, size: float, *, freed: float) -> None:
        """Of `size` elements a token; `freed` bytes of gradient are then no longer needed."""
        wide, own = FP32 * self.tokens * size, self.c * self.tokens * size
        if self.given.narrow:
            self.tape.make(WORKSPACE, wide)
        self.tape.passing(WORKSPACE, wide + own if self.given.narrow else 0)
        self.tape.make(WORKSPACE, 2 * own)
        if self.given.narrow:
            self.tape.drop(WORKSPACE, wide)
        self.tape.drop(WORKSPACE, freed)
        self.tape.make(WORKSPACE, 1.5 * own)  # negated half, and the two halves joined
        self.tape.drop(WORKSPACE, 1.5 * own)
        self.tape.passing(WORKSPACE, own)
        self.tape.drop(WORKSPACE, own)

    def swiglu_forward(self, width: int) -> None:
        """Ends with its output in the workspace."""
        hidden = self.model.hidden_size
        self.cast_in(hidden)
        self.weight_cast(3 * width * hidden)
        self.gated_forward(self.tokens, width)
        self.tape.make(WORKSPACE, self.narrowed)
        self.leave_gated(self.tokens, width)

    def swiglu_backward(self, width: int) -> None:
        """From the gradient of the residual stream; leaves that of the input in the compute format."""
        tape, hidden, part = self.tape, self.model.hidden_size, self.c * self.tokens * width
        if self.given.narrow:
            tape.make(WORKSPACE, self.narrowed)
        self.gated_backward(self.tokens, width, width * hidden, self.given.layout.shard)
        tape.make(WORKSPACE, self.narrowed)
        if self.given.narrow:
            tape.drop(WORKSPACE, self.narrowed)
        tape.drop(WORKSPACE, 2 * part)
        tape.drop(ACTIVATIONS, self.kept_gate_up(self.tokens, width))
        self.let_input_go(hidden)
        self.gated_weights(width * hidden, self.given.layout.shard)

    @property
    def keeps_fp8_gate_up(self) -> bool:
        return self.given.fp8 is not None and self.given.fp8.swiglu_input

    def kept_gate_up(self, rows: float, width: int) -> float:
        """Bytes of gate and up as a recipe keeps them, else in the compute format."""
        return rows_bytes(rows, 2 * width) if self.keeps_fp8_gate_up else 2 * self.c * rows * width

    def gated_weights(self, down_weights: int, share: int) -> None:
        """Both weights' gradients, made in the products' format, are kept in FP32; products let go of their casts."""
        tape, own_bytes = self.tape, self._gradient_bytes
        for weights in (2 * down_weights, down_weights):
            own = own_bytes * weights
            if share > 1:  # whole until the layer is done, then summed over devices and cut
                self.gathered += round(own)
            elif own_bytes == FP32:
                tape.drop(WORKSPACE, own)
            if not self.given.gradients_exist:
                tape.make(GRADIENTS, FP32 * weights / share)
            elif share == 1:
                tape.passing(WORKSPACE, FP32 * weights)
            if share == 1 and own_bytes < FP32:
                tape.drop(WORKSPACE, own)
            if own_bytes < FP32 and self.given.layout.shard == 1:
                tape.drop(COPIES, own)

    @property
    def _gradient_bytes(self) -> int:
        """Of a weight's gradient as a product makes it."""
        return self.c if self.given.fp8 is None else FP32

    def gated_forward(self, rows: float, width: int) -> None:
        """silu(gate) · up of `rows` rows, from gate and up, which alone are kept."""
        part = self.c * rows * width
        if self.keeps_fp8_gate_up:  # of which the product makes a form that is not kept
            self.tape.make(WORKSPACE, 2 * part)
        self.tape.make(ACTIVATIONS, self.kept_gate_up(rows, width))
        self.tape.passing(WORKSPACE, 2 * part)
        self.tape.make(WORKSPACE, part)

    def leave_gated(self, rows: float, width: int) -> None:
        """Once the second product is made: what is not kept goes."""
        self.tape.drop(WORKSPACE, self.c * rows * width * (3 if self.keeps_fp8_gate_up else 1))

    def gated_backward(self, rows: float, width: int, down_weights: int, share: int) -> None:
        """From the gradient of the second product to that of gate and up, joined, and both weights' in their format."""
        tape, part = self.tape, self.c * rows * width
        if self.keeps_fp8_gate_up:
            tape.passing(WORKSPACE, 2 * FP32 * rows * width)
            tape.make(WORKSPACE, 2 * part)  # in the compute format again
        tape.passing(WORKSPACE, 2 * part)
        tape.make(WORKSPACE, part)  # the result again
        tape.make(WORKSPACE, self._gradient_bytes * down_weights)
        tape.drop(WORKSPACE, part)
        tape.make(WORKSPACE, part)  # its gradient
        tape.passing(WORKSPACE, 6 * part)
        tape.make(WORKSPACE, 2 * part)
        tape.drop(WORKSPACE, part)
        if self.keeps_fp8_gate_up:
            tape.drop(WORKSPACE, 2 * part)
        tape.make(WORKSPACE, 2 * self._gradient_bytes * down_weights)
