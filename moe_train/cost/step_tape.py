"""Which tensors a training step makes and lets go: embedding, blocks, head, MTP modules, as the model runs them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_train.config import ModelConfig
from moe_train.cost.block_tape import block_backward, block_forward
from moe_train.cost.fp8_operands import weight_bytes
from moe_train.cost.head_tape import kept_gradient, loss_forward
from moe_train.cost.layer_tape import FP32, Circumstances, LayerTape
from moe_train.cost.optimizer_memory import layer_matrices
from moe_train.cost.tape import ACTIVATIONS, COPIES, GRADIENTS, HEAD_GRADIENTS, WORKSPACE, Tape


@dataclass(frozen=True)
class StepTape:
    """Writes the passes of one micro-batch of `sequences` of `length` tokens."""

    tape: Tape
    model: ModelConfig
    vocab_size: int
    sequences: int
    length: int
    given: Circumstances
    activation_checkpointing: bool

    def layer(self, depth: int = 0) -> LayerTape:
        """Of a block of the main model, or of the MTP module `depth`, which has a token less for each one before it."""
        tokens = self.sequences * max(0, self.length - depth)
        return LayerTape(self.tape, self.model, tokens, self.given, remakes=not self.activation_checkpointing)

    @property
    def head(self) -> int:
        """Elements of the output head."""
        return self.vocab_size * self.model.hidden_size

    def forward(self) -> None:
        """Ends with the losses of the last head, when what only Python names held is let go."""
        main = self.layer()
        self.tape.make(ACTIVATIONS, main.residual)  # embedded tokens
        for index in range(self.model.num_hidden_layers):
            self._block_forward(main, self.model.is_moe_layer(index))
        self._last_norm(main)
        self._loss(main)
        last = main
        for depth in range(1, self.model.mtp_depth + 1):
            last = self.layer(depth)
            self._module_forward(last)
            self._loss(last)
        self.tape.drop(ACTIVATIONS, self._last_normed(last))
        if (
            self.activation_checkpointing and self.given.fp8 is None
        ):  # autocast's casts live as long as the forward pass
            self.tape.drop(COPIES, self.tape.held().get(COPIES, 0))

    def _last_norm(self, layer: LayerTape) -> None:
        """Its result is the loss's, and the next module's."""
        self.tape.make(ACTIVATIONS, self._last_normed(layer))

    @property
    def _head_reads_rounded(self) -> bool:
        """Whether the last norm rounds what it gives to the head, in the same visit; modules go on from it in FP32."""
        return self.given.fuses_norms and not self.model.mtp_depth

    def _last_normed(self, layer: LayerTape) -> float:
        """Bytes of what it gives to the head."""
        return layer.narrowed if self._head_reads_rounded else layer.residual

    def backward(self) -> None:
        main = self.layer()
        for depth in range(self.model.mtp_depth, 0, -1):
            module = self.layer(depth)
            self._loss_backward(module, first=depth == self.model.mtp_depth)
            self._module_backward(module, self.layer(depth - 1), last=depth == self.model.mtp_depth)
        self._loss_backward(main, first=not self.model.mtp_depth)
        if self.model.mtp_depth:  # what the first module gave to the hidden states
            main.summed()
        main.norm_backward(self.model.hidden_size)
        if self.given.fuses_norms:  # and beside it the gradient of what the last block added
            main.tape.make(WORKSPACE, main.residual + main.narrowed - self._last_normed(main))
        for index in reversed(range(self.model.num_hidden_layers)):
            self._block_backward(main, self.model.is_moe_layer(index))
        if self.given.fuses_norms:  # nothing was added to embedded tokens
            main.tape.drop(WORKSPACE, main.narrowed)
        self._lookup_backward(main.residual, added=self.model.tie_word_embeddings or self.model.mtp_depth > 0)
        self._settle()
        if self.given.fp8 is not None:
            self.tape.drop(COPIES, self.tape.held().get(COPIES, 0))

    # -------------------------------------------------------------------------------------------------- blocks

    def _rounded(self, is_moe: bool, *, module: bool = False) -> None:
        """FP8 forms of a block's weights, made for both products at once and held to the end of the step.

        Sharded ones are let go with the gathered weights (memory.py).
        """
        given = self.given
        if given.fp8 is None or given.layout.shard > 1:
            return
        matrices = list(layer_matrices(self.model, is_moe, given.layout.expert_parallel))
        if module:
            matrices.append((1, self.model.hidden_size, 2 * self.model.hidden_size))
        self.tape.make(COPIES, weight_bytes(matrices))

    def _block_forward(self, layer: LayerTape, is_moe: bool) -> None:
        self._rounded(is_moe)
        if not self.activation_checkpointing:
            block_forward(layer, self.model.moe if is_moe else None)
            return
        self._checkpointed(layer, is_moe)
        self.tape.make(ACTIVATIONS, layer.residual)

    def _checkpointed(self, layer: LayerTape, is_moe: bool) -> None:
        """Only the casts of plain weights outlive a block whose activations are let go."""
        casts = LayerTape(Tape(), self.model, 0, self.given)
        block_forward(casts, self.model.moe if is_moe else None)
        copies = casts.tape.held().get(COPIES, 0)
        if is_moe and self.model.moe is not None and copies:
            moe, layout = self.model.moe, self.given.layout
            experts = moe.num_experts * moe.moe_intermediate_size * self.model.hidden_size // layout.expert_parallel
            copies -= 3 * layer.c * experts
        self.tape.make(COPIES, copies)

    def largest_recomputed(self) -> int:
        """Bytes of activations of the largest block or module, which exist again in its backward pass."""
        most = 0
        for is_moe in (False, True):
            if (is_moe and self.model.moe is not None) or (not is_moe and not self.model.is_moe_layer(0)):
                alone = replace(self, tape=Tape())
                block_forward(alone.layer(), self.model.moe if is_moe else None, again=True)
                most = max(most, alone.tape.held()[ACTIVATIONS])
        if self.model.mtp_depth:
            alone = replace(self, tape=Tape())
            alone._within_module(alone.layer(1), again=True)
            most = max(most, alone.tape.held()[ACTIVATIONS])
        return most

    def _block_backward(self, layer: LayerTape, is_moe: bool) -> None:
        moe = self.model.moe if is_moe else None
        if self.activation_checkpointing:
            block_forward(layer, moe, again=True)
        block_backward(layer, moe)

    # ---------------------------------------------------------------------------------------------------- heads

    def _loss(self, layer: LayerTape) -> None:
        loss_forward(layer, self.vocab_size, rounded=self._head_reads_rounded)

    def _loss_backward(self, layer: LayerTape, *, first: bool) -> None:
        tape, head = self.tape, FP32 * self.head
        gradient = kept_gradient(layer, rounded=self._head_reads_rounded)
        tape.make(WORKSPACE, gradient)
        tape.make(WORKSPACE, head)
        tape.drop(ACTIVATIONS, gradient)
        tape.drop(HEAD_GRADIENTS, head)
        if self.model.tie_word_embeddings:
            if not first:
                tape.make(WORKSPACE, head)
                tape.drop(WORKSPACE, 2 * head)
        else:
            self._settle(added=not first)

    def _settle(self, *, added: bool = False) -> None:
        """The gradient of the embedding or the head, whole in the workspace, becomes or joins the parameter's."""
        self.tape.drop(WORKSPACE, FP32 * self.head)
        if not (added or self.given.gradients_exist):
            self.tape.make(GRADIENTS, FP32 * self.head / self.given.layout.shard)

    def _lookup_backward(self, gradient: float, *, added: bool) -> None:
        """The embedding's gradient is dense, whatever tokens there were; let go with it is that of its result."""
        tape, table = self.tape, FP32 * self.head
        tape.make(WORKSPACE, table)
        tape.drop(WORKSPACE, gradient)
        if added:
            tape.make(WORKSPACE, table)
            tape.drop(WORKSPACE, 2 * table)

    # -------------------------------------------------------------------------------------------------- modules

    def _module_forward(self, layer: LayerTape) -> None:
        self.tape.make(ACTIVATIONS, layer.residual)  # the embeddings of later tokens
        self._rounded(self.model.moe is not None, module=True)
        if self.activation_checkpointing:
            self._checkpointed(layer, self.model.moe is not None)
            layer.weight_cast(2 * self.model.hidden_size**2)
            self.tape.make(ACTIVATIONS, layer.residual)
            return
        self._within_module(layer)

    def _within_module(self, layer: LayerTape, *, again: bool = False) -> None:
        tape, hidden = self.tape, self.model.hidden_size
        layer.norm_forward(hidden, exact=True)
        layer.norm_forward(hidden, exact=True)
        tape.make(WORKSPACE, 2 * layer.residual)  # joined
        tape.drop(WORKSPACE, 2 * layer.residual)  # the norms' results
        layer.enter_products(2 * hidden)
        layer.cast_in(2 * hidden)
        layer.weight_cast(2 * hidden**2)
        tape.make(ACTIVATIONS, layer.residual)
        block_forward(layer, self.model.moe)
        layer.leave_products(2 * hidden, exact=True)
        self._last_norm(layer)
        if again:
            tape.drop(ACTIVATIONS, layer.residual)

    def _module_backward(self, layer: LayerTape, before: LayerTape, *, last: bool) -> None:
        """Leaves the gradient of the hidden states it was given, in place of that of its own."""
        tape, hidden = self.tape, self.model.hidden_size
        if not last:  # what the next module gave to these hidden states
            layer.summed()
        if self.activation_checkpointing:
            self._within_module(layer, again=True)
        layer.norm_backward(hidden)
        if self.given.fuses_norms:
            tape.make(WORKSPACE, layer.narrowed)
        block_backward(layer, self.model.moe)
        if self.given.narrow:
            tape.make(WORKSPACE, 0 if self.given.fuses_norms else layer.narrowed)
            tape.drop(WORKSPACE, layer.residual)
        layer.enter_products_backward(2 * hidden, exact=True)
        tape.make(WORKSPACE, 2 * layer.narrowed)
        layer.weight_gradient(2 * hidden**2)
        tape.drop(WORKSPACE, layer.narrowed)
        layer.let_input_go(2 * hidden)
        layer.leave_products_backward(2 * hidden)
        if self.given.narrow:
            tape.make(WORKSPACE, 2 * layer.residual)
            tape.drop(WORKSPACE, 2 * layer.narrowed)
        layer.norm_backward(hidden)
        layer.norm_backward(hidden)  # of the hidden states: the result of the norm before, but for its last position
        tape.drop(ACTIVATIONS, before.residual - layer.residual)
        tape.drop(WORKSPACE, layer.gathered)
        self._lookup_backward(layer.residual, added=self.model.tie_word_embeddings or not last)
        tape.make(WORKSPACE, before.residual)  # padded
        tape.drop(WORKSPACE, layer.residual)
