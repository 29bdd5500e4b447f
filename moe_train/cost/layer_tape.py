"""Which tensors norms and products make and let go, forward and backward, as `model/norm.py` and `layers.py` run them.

The order is that of autograd: what was computed last is differentiated first, and what an operation had kept is let go
when its backward is done. Names in a Python frame live until the function returns. Left out is what is below a
percent: masks, scales, indices where rows are, a token's scores where it has experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config import ModelConfig
from moe_train.cost.fp8_operands import Fp8Kept, rows_bytes
from moe_train.cost.kernels import MOST_IN_PARTS, Kernels, parts
from moe_train.cost.layout import Layout
from moe_train.cost.tape import ACTIVATIONS, COPIES, GRADIENTS, WORKSPACE, Tape

FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Circumstances:
    """What a step's tensors depend on beside the model."""

    compute_bytes: int  # of a number in matrix products
    gradients_exist: bool  # from micro-batches before, or in DDP's buckets: a new one is added to them and let go
    kernels: Kernels
    layout: Layout
    fp8: Fp8Kept | None = None  # linear layers of the blocks multiply in FP8, and keep inputs and weights in it

    @property
    def narrow(self) -> bool:
        return self.compute_bytes < FP32

    @property
    def compiled(self) -> bool:
        """By kernels/cpu, which leave FP32 to torch."""
        return self.kernels is Kernels.COMPILED and self.narrow

    @property
    def triton(self) -> bool:
        return self.kernels is Kernels.TRITON

    @property
    def torch(self) -> bool:
        return not (self.compiled or self.triton)

    @property
    def fuses_norms(self) -> bool:
        """A norm adds to the residual stream and rounds in the same visit, and so its gradient: no FP32 in between.

        (model/norm.py, gpu_norm.py, kernels/cpu/norm.py.)
        """
        return self.narrow and not self.torch

    @property
    def reads_weights_in_fp32(self) -> bool:
        """A product reads master weights as they are and its kernel makes their gradients in FP32: no casts."""
        return self.compiled and self.fp8 is None and self.layout.shard == 1  # gathered ones are in BF16

    @property
    def reads_rows_by_index(self) -> bool:
        """Experts find rows of tokens by an index (kernels/experts.py, kernels/cpu/experts.py): none is copied.

        Not where tokens travel to other devices, nor in FP8 where rows share scales (precision/fp8_swiglu.py).
        """
        on_gpu = self.triton and (self.narrow if self.fp8 is None else self.fp8.by_token)
        return (self.reads_weights_in_fp32 or on_gpu) and self.layout.expert_parallel == 1

    @property
    def adds_to_routed(self) -> bool:
        """The sums of routed experts begin with what shared ones gave (kernels/experts.py)."""
        return self.reads_rows_by_index and self.triton and self.fp8 is None


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

    def norm_forward(self, features: int, *, copied: bool = False, exact: bool = False) -> None:
        """`copied`: its input is kept for this alone. The result stands in the workspace; `exact`: surely in FP32."""
        if copied:
            self.tape.make(ACTIVATIONS, self.c * self.tokens * features)
        if self._is_wide(exact):
            self.tape.make(WORKSPACE, FP32 * self.tokens * features)

    def _is_wide(self, exact: bool) -> bool:
        """Whether a norm's result exists in FP32."""
        return exact or not self.given.fuses_norms

    def enter_products(self, features: int) -> None:
        """From a norm's result in the workspace: the form of it that products read, once for all of them."""
        wide, own = FP32 * self.tokens * features, self.c * self.tokens * features
        if self.given.narrow:
            self.tape.make(self.kept, own)
        elif self.kept != WORKSPACE:
            self.tape.drop(WORKSPACE, wide)
            self.tape.make(self.kept, wide)

    def leave_products(self, features: int, *, exact: bool = False) -> None:
        """The form that products read goes, but for what they keep; the norm's result goes too."""
        wide, own = FP32 * self.tokens * features, self.c * self.tokens * features
        if self._is_wide(exact) and (self.given.narrow or self.kept == WORKSPACE):
            self.tape.drop(WORKSPACE, wide)
        if self.given.narrow and self.kept == WORKSPACE:
            self.tape.drop(WORKSPACE, own)

    def enter_products_backward(self, features: int, *, exact: bool = False) -> None:
        """What products read is there again."""
        own = self.c * self.tokens * features
        if self.remakes:
            wide = FP32 * self.tokens * features if self.given.narrow and self._is_wide(exact) else 0
            self.tape.make(WORKSPACE, wide)
            self.tape.make(WORKSPACE, own)
            self.tape.drop(WORKSPACE, wide)

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
            tape.drop(ACTIVATIONS, self.c * self.tokens * features if copied else size)

    def norm_of_sum_backward(self, *, exact: bool = False) -> None:
        """From the gradients of the residual stream and of its norm to that of the stream before something was added.

        Where norms are fused that of what was added comes from the same visit, as products read it, and stays beside.
        `exact`: the norm's result has a gradient in FP32 as well.
        """
        if not self.given.fuses_norms:
            self.norm_backward(self.model.hidden_size, added=True)
            return
        self.tape.make(WORKSPACE, self.residual + self.narrowed)
        self.tape.drop(WORKSPACE, self.residual + self.narrowed + (self.residual if exact else 0))
        self.tape.drop(ACTIVATIONS, self.residual)

    def enter_branch_backward(self) -> None:
        """The gradient of what attention or an FFN adds to the stream, in the compute format."""
        if self.given.narrow and not self.given.fuses_norms:
            self.tape.make(WORKSPACE, self.narrowed)

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
        if self.casts_weights:
            self.tape.make(COPIES, self.c * weights)

    @property
    def casts_weights(self) -> bool:
        """Whether products read a copy in the compute format; a gathered weight is in it already."""
        given = self.given
        return given.narrow and given.fp8 is None and given.layout.shard == 1 and not given.reads_weights_in_fp32

    def weight_gradient(self, weights: int, *, share: int | None = None, cast: bool = True, freed: float = 0.0) -> None:
        """A product's gradient of its weight: made in the compute format, kept in FP32.

        `share`: the parts it is cut into, those of the layout if not given. `cast`: the product read a cast of the
        weight; FP8 products make the gradient in FP32 at once. `freed`: bytes of the result's gradient, of no use from
        here on.
        """
        in_fp32 = self.given.fp8 is not None or self.given.reads_weights_in_fp32
        if cast and self.given.reads_weights_in_fp32 and weights <= MOST_IN_PARTS:
            self.tape.passing(WORKSPACE, self.summed_parts(weights))
        cast = cast and not in_fp32
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

    def summed_parts(self, weights: int) -> int:
        """Bytes of a weight's gradients over parts of the rows, which a kernel in C adds up."""
        return FP32 * parts(self.tokens) * weights

    def cast_back(self) -> None:
        """The gradient of a product's cast input, in FP32 again; FP32 inputs and fused norms need none."""
        if self.given.narrow and not self.given.fuses_norms:
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
