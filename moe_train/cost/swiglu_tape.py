"""Which tensors a SwiGLU makes and lets go, forward and backward: dense, of shared experts, or of all routed ones.

torch's operations make its input's halves, its result and their gradients one after the other (`precision/swiglu.py`).
Triton's kernels have one visit in each direction between two products; those in C go from rows to rows in one, without
writing anything between, where weights are an expert's or few.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.cost.fp8_operands import rows_bytes
from moe_train.cost.kernels import MOST_IN_ONE_KERNEL
from moe_train.cost.layer_tape import FP32, LayerTape
from moe_train.cost.tape import ACTIVATIONS, COPIES, GRADIENTS, WORKSPACE


def swiglu_forward(layer: LayerTape, width: int) -> None:
    """Of all tokens. Ends with its output in the workspace."""
    swiglu = SwiGLUTape.of_tokens(layer, width)
    layer.cast_in(layer.model.hidden_size)
    layer.weight_cast(3 * swiglu.down_weights)
    swiglu.forward()
    layer.tape.make(WORKSPACE, layer.narrowed)
    swiglu.leave()


def swiglu_backward(layer: LayerTape, width: int, *, beside_routed: bool = False) -> None:
    """From the gradient of what is added to the stream; leaves that of the input in the compute format.

    `beside_routed`: a fused norm's gradient of what was added is that of the routed experts' result, too.
    """
    tape, swiglu = layer.tape, SwiGLUTape.of_tokens(layer, width)
    layer.enter_branch_backward()
    if swiglu.in_one_kernel:
        tape.passing(WORKSPACE, layer.summed_parts(3 * swiglu.down_weights))
    swiglu.backward()
    tape.make(WORKSPACE, layer.narrowed)
    if layer.given.narrow and not (beside_routed and layer.given.fuses_norms):
        tape.drop(WORKSPACE, layer.narrowed)
    swiglu.leave_backward()
    layer.let_input_go(layer.model.hidden_size)
    swiglu.weights_backward()


@dataclass(frozen=True)
class SwiGLUTape:
    """`rows` rows through one SwiGLU `width` wide, or `routed` ones, each through an expert's."""

    layer: LayerTape
    rows: float
    width: int
    down_weights: int  # of the second product, those of all experts; the first has twice as many
    share: int  # parts that gradients of weights are cut into
    routed: bool = False
    by_index: bool = False  # from rows of tokens where they are

    @classmethod
    def of_tokens(cls, layer: LayerTape, width: int) -> SwiGLUTape:
        return cls(layer, layer.tokens, width, width * layer.model.hidden_size, layer.given.layout.shard)

    @property
    def in_one_kernel(self) -> bool:
        few = 3 * self.down_weights <= MOST_IN_ONE_KERNEL
        return self.layer.given.reads_weights_in_fp32 and (self.routed or few)

    @property
    def _one_visit(self) -> bool:
        """Between the products, by a kernel."""
        return self.layer.given.fp8 is None and not self.layer.given.torch

    @property
    def _part(self) -> float:
        """Bytes of the result in the compute format; gate and up are twice as many."""
        return self.layer.c * self.rows * self.width

    @property
    def _keeps_fp8(self) -> bool:
        fp8 = self.layer.given.fp8
        return fp8 is not None and fp8.swiglu_input

    @property
    def _kept(self) -> float:
        """Bytes of gate and up as a recipe keeps them, else in the compute format."""
        return rows_bytes(self.rows, 2 * self.width) if self._keeps_fp8 else 2 * self._part

    @property
    def _gradient_bytes(self) -> int:
        """Of a weight's gradient as a product makes it."""
        given = self.layer.given
        sums_in_fp32 = given.reads_weights_in_fp32 or (self.by_index and given.layout.shard == 1)
        return FP32 if given.fp8 is not None or sums_in_fp32 else given.compute_bytes

    def forward(self) -> None:
        """silu(gate) · up, from gate and up, which alone are kept."""
        tape, part = self.layer.tape, self._part
        if self._keeps_fp8:  # of which the product makes a form that is not kept
            tape.make(WORKSPACE, 2 * part)
        tape.make(ACTIVATIONS, self._kept)
        if self.in_one_kernel:
            return
        if not self._one_visit:
            tape.passing(WORKSPACE, 2 * part)
        tape.make(WORKSPACE, part)

    def leave(self) -> None:
        """Once the second product is made: what is not kept goes."""
        if not self.in_one_kernel:
            self.layer.tape.drop(WORKSPACE, self._part * (3 if self._keeps_fp8 else 1))

    def backward(self) -> None:
        """From the gradient of the second product to that of gate and up, joined, and both weights' in their format."""
        tape, part, weights = self.layer.tape, self._part, self._gradient_bytes * self.down_weights
        if self.in_one_kernel:
            tape.make(WORKSPACE, 3 * weights)
            return
        if self._one_visit:
            tape.make(WORKSPACE, part)  # the result's gradient
            tape.make(WORKSPACE, 3 * part)  # the result again, gradients of gate and up
            tape.drop(WORKSPACE, part)
            tape.make(WORKSPACE, weights)
            tape.drop(WORKSPACE, part)
            tape.make(WORKSPACE, 2 * weights)
            return
        if self._keeps_fp8:
            if not self.layer.given.triton:  # which widens it in one visit
                tape.passing(WORKSPACE, 2 * FP32 * self.rows * self.width)
            tape.make(WORKSPACE, 2 * part)  # in the compute format again
        tape.passing(WORKSPACE, 2 * part)
        tape.make(WORKSPACE, part)  # the result again
        tape.make(WORKSPACE, weights)
        tape.drop(WORKSPACE, part)
        tape.make(WORKSPACE, part)  # its gradient
        tape.passing(WORKSPACE, 6 * part)
        tape.make(WORKSPACE, 2 * part)
        tape.drop(WORKSPACE, part)
        if self._keeps_fp8:
            tape.drop(WORKSPACE, 2 * part)
        tape.make(WORKSPACE, 2 * weights)

    def leave_backward(self) -> None:
        """Once the input has its gradient: that of gate and up goes, and what was kept.

        Rows that were read by an index are summed by tokens before the latter.
        """
        tape = self.layer.tape
        if not self.in_one_kernel:
            tape.drop(WORKSPACE, 2 * self._part)
        if self.by_index:
            tape.passing(WORKSPACE, self.layer.narrowed)
        tape.drop(ACTIVATIONS, self._kept)

    def weights_backward(self) -> None:
        """Both weights' gradients, made in the products' format, are kept in FP32; products let go of their casts."""
        layer, tape, own_bytes = self.layer, self.layer.tape, self._gradient_bytes
        for weights in (2 * self.down_weights, self.down_weights):
            own = own_bytes * weights
            if self.share > 1:  # whole until the layer is done, then summed over devices and cut
                layer.gathered += round(own)
            elif own_bytes == FP32:
                tape.drop(WORKSPACE, own)
            if not layer.given.gradients_exist:
                tape.make(GRADIENTS, FP32 * weights / self.share)
            elif self.share == 1:
                tape.passing(WORKSPACE, FP32 * weights)
            if self.share == 1 and own_bytes < FP32:
                tape.drop(WORKSPACE, own)
            if layer.casts_weights:
                tape.drop(COPIES, layer.c * weights)
