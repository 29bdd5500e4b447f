"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): modules that each look one token further.

Module k joins what the one before made of position i with the embedding of token i + k, and predicts token i + k + 1
through the main model's own embedding and head. The order of the joined halves and the norms are those of the released
weights: embedding first, and a final norm of its own. The main model's hidden states enter after its final norm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_train.config import ModelConfig
from moe_train.model.attention import LayerCache
from moe_train.model.block import Block, BlockOutput
from moe_train.model.layers import Linear
from moe_train.model.norm import RMSNorm, normed
from moe_train.model.rope import Rotary
from moe_train.precision.remade import in_compute_format, remade


class MTPModule(nn.Module):
    """One step further: hidden states (b, t, d) and embeddings (b, t, d) → hidden states (b, t, d)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.embedding_norm = RMSNorm(size, eps=eps)
        self.hidden_norm = RMSNorm(size, eps=eps)
        self.join_proj = Linear(2 * size, size)
        self.block = Block(config, config.num_hidden_layers)
        self.norm = RMSNorm(size, eps=eps)

    def forward(
        self,
        hidden_btd: Tensor,
        embedding_btd: Tensor,
        rotary: Rotary,
        cache: LayerCache | None = None,
        real_bt: Tensor | None = None,
    ) -> BlockOutput:
        """Position i of `embedding_btd` is that of the token k after position i of `hidden_btd`.

        real_bt: False where that token is padding; None: there is none.
        The output's hidden states are normed: what the head reads, and what the next module takes.
        """

        def joined(embedding_btd: Tensor, hidden_btd: Tensor) -> Tensor:
            return torch.cat((self.embedding_norm(embedding_btd), self.hidden_norm(hidden_btd)), dim=-1)

        joined_btd = in_compute_format(remade(joined, embedding_btd, hidden_btd))
        stream_btd = self.join_proj(joined_btd).to(embedding_btd.dtype)  # as wide as the main model's, to be added to
        out: BlockOutput = self.block(stream_btd, rotary, cache, real_bt)
        normed_btd = normed(self.norm, out.stream_btd, out.added_btd, exact=True).exact
        return BlockOutput(normed_btd, None, out.routed)
