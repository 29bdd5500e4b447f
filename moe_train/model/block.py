"""One layer: attention and FFN (dense or MoE), each added to the residual stream after a norm of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.config import ModelConfig
from moe_train.model.attention import LayerCache, build_attention
from moe_train.model.experts import MoELayer, Routed
from moe_train.model.layers import SwiGLU
from moe_train.model.norm import RMSNorm, normed
from moe_train.model.rope import Rotary


class BlockOutput(NamedTuple):
    """The residual stream, and what is to be added to it, which the norm that follows does in the same visit."""

    stream_btd: Tensor
    added_btd: Tensor | None
    routed: Routed | None  # None in a dense layer

    @property
    def hidden_btd(self) -> Tensor:
        return self.stream_btd if self.added_btd is None else self.stream_btd + self.added_btd


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
        self,
        x_btd: Tensor,
        rotary: Rotary,
        cache: LayerCache | None = None,
        real_bt: Tensor | None = None,
        added_btd: Tensor | None = None,
    ) -> BlockOutput:
        """x_btd + added_btd: the hidden states.

        real_bt: False for padding, which no expert's load and no loss of a router counts; None: there is none.
        """
        before = normed(self.input_norm, x_btd, added_btd)
        x_btd, normed_btd = before.total, before.narrow
        del before  # attention does without the norm in FP32
        attended_btd = self.dropped(self.attention(normed_btd, rotary, cache))
        dense = isinstance(self.ffn, SwiGLU)
        between = normed(self.post_attention_norm, x_btd, attended_btd, exact=not dense)
        if isinstance(self.ffn, SwiGLU):
            return BlockOutput(between.total, self.dropped(self.ffn(between.narrow)), None)
        out_btd, routed = self.ffn(between.narrow, between.exact, real_bt)
        return BlockOutput(between.total, self.dropped(out_btd), routed)

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x
