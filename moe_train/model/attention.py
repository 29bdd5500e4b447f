"""Causal self-attention: multi-head latent attention and grouped-query attention, both through torch's SDPA.

MLA (DeepSeek-V2, arXiv 2405.04434, section 2.1) caches one compressed vector and one rotary key a token for all heads;
GQA (arXiv 2305.13245) caches the keys and values of its few key-value heads. Both take an optional cache for
generation; what it holds is what the published cache sizes count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.config import GQAConfig, MLAConfig, ModelConfig
from moe_train.model.layers import Linear, RMSNorm, rotate

Rotary = tuple[Tensor, Tensor]  # cos, sin: (t, rotary features)


class LayerCache:
    """What one layer remembers of earlier positions: two tensors that grow along their position axis (-2)."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        return 0 if self.held is None else self.held[0].shape[-2]

    def extend(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new positions and return all of them."""
        if self.held is not None:
            first = torch.cat((self.held[0], first), dim=-2)
            second = torch.cat((self.held[1], second), dim=-2)
        self.held = (first, second)
        return self.held


def causal_attention(q_bhtc: Tensor, k_bhsc: Tensor, v_bhsc: Tensor, *, grouped: bool = False) -> Tensor:
    """Softmax attention of the last t of s positions, each on itself and all before; scale 1/√c. (b, h, t, c_v)"""
    t, s = q_bhtc.shape[-2], k_bhsc.shape[-2]
    mask = None
    if 1 < t < s:  # new positions after cached ones: SDPA's own causal mask would align to the wrong corner
        mask = torch.ones(t, s, dtype=torch.bool, device=q_bhtc.device).tril(s - t)
    return F.scaled_dot_product_attention(
        q_bhtc, k_bhsc, v_bhsc, attn_mask=mask, is_causal=t == s and t > 1, enable_gqa=grouped
    )


class MLA(nn.Module):
    """Multi-head latent attention, (b, t, d) → (b, t, d)."""

    def __init__(self, config: MLAConfig, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        self.config = config
        heads = config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden_size, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(hidden_size, config.q_lora_rank)
            self.q_a_norm = RMSNorm(config.q_lora_rank, eps=norm_eps)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj = Linear(hidden_size, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_norm = RMSNorm(config.kv_lora_rank, eps=norm_eps)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, hidden_size)

    def queries(self, x_btd: Tensor) -> Tensor:
        if self.config.q_lora_rank is None:
            q: Tensor = self.q_proj(x_btd)
        else:
            q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x_btd)))
        q_bhtc: Tensor = q.unflatten(-1, (self.config.num_attention_heads, -1)).transpose(1, 2)
        return q_bhtc

    def forward(self, x_btd: Tensor, rotary: Rotary, cache: LayerCache | None = None) -> Tensor:
        c = self.config
        q_nope, q_rope = self.queries(x_btd).split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
        q = torch.cat((q_nope, rotate(q_rope, *rotary)), dim=-1)

        latent, k_rope = self.kv_a_proj(x_btd).split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        latent, k_rope = self.kv_a_norm(latent), rotate(k_rope, *rotary)  # one rotary key serves every head
        if cache is not None:
            latent, k_rope = cache.extend(latent, k_rope)

        kv = self.kv_b_proj(latent).unflatten(-1, (c.num_attention_heads, -1)).transpose(1, 2)
        k_nope, v = kv.split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)
        k_shared = k_rope.unsqueeze(1).expand(-1, c.num_attention_heads, -1, -1)
        k = torch.cat((k_nope, k_shared.to(k_nope.dtype)), dim=-1)

        out: Tensor = self.o_proj(causal_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class GQA(nn.Module):
    """Grouped-query attention, (b, t, d) → (b, t, d); as many key-value heads as heads is multi-head attention."""

    def __init__(self, config: GQAConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.q_proj = Linear(hidden_size, config.num_attention_heads * config.head_dim)
        self.k_proj = Linear(hidden_size, config.num_key_value_heads * config.head_dim)
        self.v_proj = Linear(hidden_size, config.num_key_value_heads * config.head_dim)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, hidden_size)

    def forward(self, x_btd: Tensor, rotary: Rotary, cache: LayerCache | None = None) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            x_bhtc: Tensor = x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            return x_bhtc

        q = rotate(heads(self.q_proj(x_btd)), *rotary)
        k = rotate(heads(self.k_proj(x_btd)), *rotary)
        v = heads(self.v_proj(x_btd))
        if cache is not None:
            k, v = cache.extend(k, v)
        grouped = self.config.num_key_value_heads != self.config.num_attention_heads
        out: Tensor = self.o_proj(causal_attention(q, k, v, grouped=grouped).transpose(1, 2).flatten(2))
        return out


def build_attention(model: ModelConfig) -> MLA | GQA:
    if isinstance(model.attention, MLAConfig):
        return MLA(model.attention, model.hidden_size, model.rms_norm_eps)
    return GQA(model.attention, model.hidden_size)


def rotary_dim(model: ModelConfig) -> int:
    """How many features of a head are turned by position."""
    attention = model.attention
    return attention.qk_rope_head_dim if isinstance(attention, MLAConfig) else attention.head_dim
