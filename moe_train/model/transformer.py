"""The decoder: embedding, pre-norm blocks of attention and FFN (dense or MoE), final norm, output head.

`forward` serves training (targets in, summed losses and expert loads out), `logits` serves generation. Weights and the
residual stream are FP32; matrix products follow autocast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.config import ModelConfig
from moe_train.model.attention import LayerCache, build_attention, rotary_dim
from moe_train.model.experts import MoELayer
from moe_train.model.layers import Linear, RMSNorm, SwiGLU, rotary_tables
from moe_train.model.loss import head_loss
from moe_train.model.router import Router
from moe_train.precision.matmul import linear


class Losses(NamedTuple):
    """Sums over the tokens of a micro-batch, so that micro-batches and ranks can be added before dividing."""

    objective: Tensor  # what is minimised: loss, z-loss and balance loss
    nll: Tensor  # the plain loss in nats, not differentiable
    counts_le: Tensor  # int64: tokens each expert of each MoE layer received; (0, 0) in a dense model


class Block(nn.Module):
    """x + attention(norm x), then x + FFN(norm x)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.input_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = build_attention(config)
        self.post_attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn: MoELayer | SwiGLU
        if config.moe is not None and config.is_moe_layer(layer):
            self.ffn = MoELayer(config.moe, config.hidden_size)
        else:
            self.ffn = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self, x_btd: Tensor, rotary: tuple[Tensor, Tensor], cache: LayerCache | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns the residual stream and, of an MoE layer, its balance loss and expert counts."""
        x_btd = x_btd + self.dropped(self.attention(self.input_norm(x_btd), rotary, cache))
        normed = self.post_attention_norm(x_btd)
        if isinstance(self.ffn, SwiGLU):
            return x_btd + self.dropped(self.ffn(normed)), None, None
        out = self.ffn(normed)
        return x_btd + self.dropped(out.hidden_btd), out.balance_loss, out.counts_e

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Transformer(nn.Module):
    """The language model of a resolved ModelConfig with a known vocabulary."""

    def __init__(self, config: ModelConfig, vocab_size: int, z_loss_weight: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.z_loss_weight = z_loss_weight
        self.embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, vocab_size)

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.weight if self.lm_head is None else self.lm_head.weight

    def routers(self) -> list[Router]:
        """The routers of the MoE layers, in order."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def initialise(self, seed: int) -> None:
        """Draw every matrix from N(0, initializer_range²), set norms to one: the same for the same seed, anywhere.

        Drawn on the CPU, since GPU generators differ from it and from each other.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim < 2:
                    parameter.fill_(1.0)
                else:
                    drawn = torch.empty(parameter.shape).normal_(0, self.config.initializer_range, generator=generator)
                    parameter.copy_(drawn)

    def hidden(self, tokens_bt: Tensor, caches: list[LayerCache] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Final normed hidden states (b, t, d), the summed balance loss and the expert counts (l, e)."""
        start = caches[0].length if caches else 0
        positions = torch.arange(start, start + tokens_bt.shape[1], device=tokens_bt.device)
        rotary = rotary_tables(positions, rotary_dim(self.config), self.config.rope_theta)
        x_btd = self.embedding(tokens_bt)
        balance_loss = x_btd.new_zeros((), dtype=torch.float32)
        counts: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            x_btd, layer_balance, layer_counts = block(x_btd, rotary, caches[layer] if caches else None)
            if layer_balance is not None and layer_counts is not None:
                balance_loss = balance_loss + layer_balance
                counts.append(layer_counts)
        counts_le = torch.stack(counts) if counts else torch.zeros(0, 0, dtype=torch.int64, device=tokens_bt.device)
        return self.norm(x_btd), balance_loss, counts_le

    def forward(self, tokens_bt: Tensor, targets_bt: Tensor) -> Losses:
        """Summed losses of predicting `targets_bt` (int64, IGNORE for padding) from `tokens_bt` (int64)."""
        hidden_btd, balance_loss, counts_le = self.hidden(tokens_bt)
        objective, nll = head_loss(hidden_btd.flatten(0, 1), self.head_weight, targets_bt.flatten(), self.z_loss_weight)
        # The balance loss is a sum over sequences: weighted by their length it becomes one over tokens like the rest.
        return Losses(objective + balance_loss * tokens_bt.shape[1], nll, counts_le)

    def logits(self, tokens_bt: Tensor, caches: list[LayerCache] | None = None) -> Tensor:
        """Scores of the next token at every given position (b, t, v); `caches` hold and take up earlier positions."""
        hidden_btd, _, _ = self.hidden(tokens_bt, caches)
        return linear(hidden_btd, self.head_weight)
