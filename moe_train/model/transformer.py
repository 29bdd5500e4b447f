"""The decoder: embedding, pre-norm blocks of attention and FFN (dense or MoE), final norm, output head, MTP modules.

`forward` serves training (targets in, summed losses and expert loads out), `logits` serves generation. Weights and the
residual stream are FP32; matrix products follow autocast.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_train.config import ModelConfig
from moe_train.model.attention import LayerCache
from moe_train.model.block import Block, BlockOutput
from moe_train.model.experts import Routed
from moe_train.model.layers import Linear
from moe_train.model.loss import IGNORE, head_loss
from moe_train.model.mtp import MTPModule
from moe_train.model.norm import RMSNorm, normed
from moe_train.model.rope import Rotary, rotary_frequencies, rotary_tables
from moe_train.model.router import Router
from moe_train.precision.matmul import linear
from moe_train.precision.remade import remaking


class Losses(NamedTuple):
    """Sums over the tokens of a micro-batch, so that micro-batches and ranks can be added before dividing.

    Padding is in none of them.
    """

    objective: Tensor  # what is minimised: loss, z-loss, weighted MTP loss and auxiliary losses
    nll: Tensor  # the plain loss in nats, not differentiable
    auxiliary: Tensor  # the routers' weighted losses, not differentiable
    mtp_nll_k: Tensor  # the plain loss of each MTP module over its targets, not differentiable
    mtp_targets_k: Tensor  # int64: how many targets each has; a token short of the module before, every sequence
    counts_le: Tensor  # int64: tokens that chose each expert of each MoE layer, MTP modules' last; (0, 0) if dense
    dropped_l: Tensor  # tokens, or pairs over top_k, that got no place in each MoE layer


class Transformer(nn.Module):
    """The language model of a resolved ModelConfig with a known vocabulary."""

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        z_loss_weight: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.z_loss_weight = z_loss_weight
        self.activation_checkpointing = activation_checkpointing
        # Not drawn here: `initialise` does, and on the meta device torch's own way imports its compiler for it (0.8 s).
        self.embedding = nn.Embedding(
            vocab_size, config.hidden_size, _weight=torch.empty(vocab_size, config.hidden_size)
        )
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, vocab_size)
        self.mtp = nn.ModuleList(MTPModule(config) for _ in range(config.mtp_depth))

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.weight if self.lm_head is None else self.lm_head.weight

    def embedded(self, tokens_bt: Tensor) -> Tensor:
        """(b, t, d). Of 32 bits on a GPU, where its backward pass sorts tokens byte by byte."""
        embedded: Tensor = self.embedding(tokens_bt.int() if tokens_bt.is_cuda else tokens_bt)
        return embedded

    def routers(self) -> list[Router]:
        """The routers of the MoE layers, in order, those of MTP modules last."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def initialise(self, seed: int) -> None:
        """Draw every matrix from N(0, initializer_range²), set norms to one: the same for the same seed, anywhere."""
        shapes = [parameter.shape for parameter in self.parameters()]
        with torch.no_grad():
            for parameter, values in zip(self.parameters(), drawn(shapes, self.config.initializer_range, seed)):
                parameter.copy_(values)

    def rotary(self, start: int, length: int, device: torch.device) -> Rotary:
        """Rotation tables of `length` positions from `start`."""
        return rotary_tables(
            torch.arange(start, start + length, device=device), rotary_frequencies(self.config, device)
        )

    def hidden(
        self, tokens_bt: Tensor, caches: Sequence[LayerCache] | None = None, real_bt: Tensor | None = None
    ) -> tuple[Tensor, list[Routed]]:
        """Final normed hidden states (b, t, d), and what the MoE layers said. real_bt: False for padding."""
        start = caches[0].length if caches else 0
        rotary = self.rotary(start, tokens_bt.shape[1], tokens_bt.device)
        out, routed = BlockOutput(self.embedded(tokens_bt), None, None), []
        for layer, block in enumerate(self.blocks):
            cache = caches[layer] if caches else None
            out = self._through(block, out.stream_btd, rotary, cache, real_bt, out.added_btd)
            if out.routed is not None:
                routed.append(out.routed)
            if self.activation_checkpointing and self.training:  # which keeps what it is given: one tensor, not two
                out = BlockOutput(out.hidden_btd, None, None)
        # MTP modules go on from the norm, the head rounds it.
        return normed(self.norm, out.stream_btd, out.added_btd, exact=len(self.mtp) > 0).exact, routed

    def _through(self, module: nn.Module, *inputs: object) -> BlockOutput:
        """Call a block, or in training do so without keeping its activations (arXiv 1604.06174) where asked to."""
        if self.activation_checkpointing and self.training:
            # Reading the state of a GPU's random numbers would wait for it.
            random = self.config.dropout > 0
            kept: BlockOutput = checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=random)
            return kept
        with remaking(self.training):
            out: BlockOutput = module(*inputs)
        return out

    def forward(self, tokens_bt: Tensor, targets_bt: Tensor, mtp_weight: float = 0.0) -> Losses:
        """Summed losses of predicting `targets_bt` (int64, IGNORE for padding) from `tokens_bt` (int64).

        mtp_weight: λ; the objective gains λ times the mean of the MTP modules' losses.
        """
        real_bt = targets_bt != IGNORE
        hidden_btd, routed = self.hidden(tokens_bt, real_bt=real_bt)
        objective, nll = self._head_loss(hidden_btd, targets_bt)
        mtp_nll, mtp_targets = [], []
        for depth, module in enumerate(self.mtp, start=1):
            # Position i joins what is known up to token i with the embedding of token i + depth.
            rotary = self.rotary(0, tokens_bt.shape[1] - depth, tokens_bt.device)
            embedding_btd = self.embedded(tokens_bt[:, depth:])
            out = self._through(module, hidden_btd[:, :-1], embedding_btd, rotary, None, real_bt[:, depth:])
            hidden_btd = out.hidden_btd
            module_objective, module_nll = self._head_loss(hidden_btd, targets_bt[:, depth:])
            objective = objective + module_objective * (mtp_weight / len(self.mtp))
            mtp_nll.append(module_nll)
            mtp_targets.append(real_bt[:, depth:].sum())
            if out.routed is not None:
                # Its sequences are shorter: brought to the main model's length, each layer's loss weighs the same.
                longer = tokens_bt.shape[1] / (tokens_bt.shape[1] - depth)
                loss, dropped = (
                    None if each is None else each * longer for each in (out.routed.auxiliary_loss, out.routed.dropped)
                )
                routed.append(out.routed._replace(auxiliary_loss=loss, dropped=dropped))
        # A GPU's small model takes as long as it has kernels: what is zero everywhere is one zero.
        losses = [r.auxiliary_loss for r in routed if r.auxiliary_loss is not None]
        auxiliary = functools.reduce(torch.add, losses) if losses else nll.new_zeros(())
        dropped_l = [r.dropped for r in routed if r.dropped is not None]  # of all layers or of none
        return Losses(
            objective + auxiliary,
            nll,
            auxiliary.detach(),
            _stacked(mtp_nll, nll),
            _stacked(mtp_targets, targets_bt),
            torch.stack([r.counts_e for r in routed]) if routed else targets_bt.new_zeros(0, 0),
            torch.stack(dropped_l) if dropped_l else nll.new_zeros(len(routed)),
        )

    def _head_loss(self, hidden_btd: Tensor, targets_bt: Tensor) -> tuple[Tensor, Tensor]:
        return head_loss(hidden_btd.flatten(0, 1), self.head_weight, targets_bt.flatten(), self.z_loss_weight)

    def logits(self, tokens_bt: Tensor, caches: Sequence[LayerCache] | None = None) -> Tensor:
        """Scores of the next token at every given position (b, t, v); `caches` hold and take up earlier positions."""
        hidden_btd, _ = self.hidden(tokens_bt, caches)
        return self.scores(hidden_btd)

    def scores(self, hidden_btd: Tensor) -> Tensor:
        """Scores of the token that follows normed hidden states, the main model's or an MTP module's: (b, t, v)."""
        return linear(hidden_btd, self.head_weight)


def drawn(shapes: Iterable[torch.Size], deviation: float, seed: int) -> Iterator[Tensor]:
    """First values of parameters of these shapes, in FP32, one after the other as one generator gives them.

    Drawn on the CPU, since GPU generators differ from it and from each other.
    """
    generator = torch.Generator().manual_seed(seed)
    for shape in shapes:
        values = torch.empty(shape, dtype=torch.float32, device="cpu")
        yield values.fill_(1.0) if len(shape) < 2 else values.normal_(0, deviation, generator=generator)


def _stacked(scalars: list[Tensor], like: Tensor) -> Tensor:
    """Scalars as one vector, an empty one of the dtype of `like` if there are none."""
    return torch.stack(scalars) if scalars else like.new_zeros(0)
