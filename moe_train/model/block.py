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
    hidden_btd: Tensor
    routed: Routed | None  # None in a dense layer


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
        self, x_btd: Tensor, rotary: Rotary, cache: LayerCache | None = None, real_bt: Tensor | None = None
    ) -> BlockOutput:
        """real_bt: False for padding, which no expert's load and no loss of a router counts; None: there is none."""
        x_btd, normed_btd, _ = normed(self.input_norm, x_btd)
        attended_btd = self.dropped(self.attention(normed_btd, rotary, cache))
        dense = isinstance(self.ffn, SwiGLU)
        x_btd, normed_btd, exact_btd = normed(self.post_attention_norm, x_btd, attended_btd, exact=not dense)
        if isinstance(self.ffn, SwiGLU):
            return BlockOutput(x_btd + self.dropped(self.ffn(normed_btd)), None)
        out_btd, routed = self.ffn(normed_btd, exact_btd, real_bt)
        return BlockOutput(x_btd + self.dropped(out_btd), routed)

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x
