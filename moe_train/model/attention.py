"""Causal self-attention: multi-head latent attention and grouped-query attention, both through torch's SDPA.

On a CPU in BF16 `kernels/cpu` takes its place, and reads projections where they lie, or else `cpu_attention`. On a GPU
`kernels/heads` makes its operands of the projections, where Triton is there.

MLA (DeepSeek-V2, arXiv 2405.04434, section 2.1) caches one compressed vector and one rotary key a token for all heads;
GQA (arXiv 2305.13245) caches the keys and values of its key-value heads. Both take an optional cache for generation;
what it holds is what the published cache sizes count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.config import GQAConfig, MLAConfig, ModelConfig
from moe_train.kernels.cpu import attention as compiled
from moe_train.model.cpu_attention import CausalAttention
from moe_train.model.layers import Linear, of_one_input
from moe_train.model.norm import RMSNorm, normed
from moe_train.model.rope import Rotary, rotate, softmax_scale
from moe_train.precision.remade import in_compute_format, made_again, remade
from moe_train.precision.support import runs_triton


class LayerCache:
    """What one layer remembers of earlier positions: two tensors that grow along their position axis (-2)."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        return 0 if self.held is None else self.held[0].shape[-2]

    @property
    def bytes(self) -> int:
        return 0 if self.held is None else sum(tensor.numel() * tensor.element_size() for tensor in self.held)

    def extend(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new positions and return all of them."""
        if self.held is not None:
            first = torch.cat((self.held[0], first), dim=-2)
            second = torch.cat((self.held[1], second), dim=-2)
        self.held = (first, second)
        return self.held

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on: those of a draft that was not accepted."""
        if self.held is not None:
            self.held = (self.held[0][..., :length, :], self.held[1][..., :length, :])


def causal_attention(q_bhtc: Tensor, k_bhsc: Tensor, v_bhsc: Tensor, scale: float, *, grouped: bool = False) -> Tensor:
    """Softmax attention of the last t of s positions, each on itself and all before: (b, h, t, c_v)."""
    t, s = q_bhtc.shape[-2], k_bhsc.shape[-2]
    if q_bhtc.device.type == "cpu" and q_bhtc.dtype == torch.bfloat16 and 1 < t == s:
        out: Tensor | None = compiled.of_heads(q_bhtc, k_bhsc, v_bhsc, scale)
        return CausalAttention.apply(q_bhtc, k_bhsc, v_bhsc, scale) if out is None else out  # type: ignore[no-untyped-call]
    mask = None
    if 1 < t < s:  # new positions after cached ones: SDPA's own causal mask would align to the wrong corner
        mask = torch.ones(t, s, dtype=torch.bool, device=q_bhtc.device).tril(s - t)
    return F.scaled_dot_product_attention(
        q_bhtc, k_bhsc, v_bhsc, attn_mask=mask, is_causal=t == s and t > 1, scale=scale, enable_gqa=grouped
    )


def _in_one_visit(rotary: Rotary, *projections: Tensor) -> bool:
    """Whether `kernels/heads` makes heads of them: in the formats it takes, and not of what torch.compile traces."""
    return (
        runs_triton(projections[0].device)
        and not torch.compiler.is_compiling()
        and all(x.dtype in (torch.bfloat16, torch.float16, torch.float32) for x in projections)
        and all(x.dtype == torch.float32 for x in rotary)
    )


def _by_token(x_bhtc: Tensor) -> Tensor:
    """The heads of a token side by side: (b, t, h · c)."""
    return x_bhtc.transpose(1, 2).flatten(2)


def _with_shared(k_bhsc: Tensor, k_rope_bsr: Tensor) -> Tensor:
    """One rotary key beside the keys of every head."""
    shared = k_rope_bsr.unsqueeze(1).expand(-1, k_bhsc.shape[1], -1, -1)
    return torch.cat((k_bhsc, shared.to(k_bhsc.dtype)), dim=-1)


class MLA(nn.Module):
    """Multi-head latent attention, (b, t, d) → (b, t, d)."""

    def __init__(self, config: MLAConfig, hidden_size: int, norm_eps: float, scale: float) -> None:
        super().__init__()
        self.config, self.scale = config, scale
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
            q = self.q_b_proj(normed(self.q_a_norm, self.q_a_proj(x_btd)).narrow)
        return q

    def forward(self, x_btd: Tensor, rotary: Rotary, cache: LayerCache | None = None) -> Tensor:
        c, x_btd = self.config, in_compute_format(x_btd)
        q = self.queries(x_btd)
        latent, k_rope = self.kv_a_proj(x_btd).split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        latents = normed(self.kv_a_norm, latent, exact=cache is not None)
        latent = latents.narrow
        held = None if cache is None else cache.extend(latents.exact, rotate(k_rope, *rotary))
        if held is None or held[0].shape[1] == x_btd.shape[1]:
            attended = self._attend(q, latent, k_rope, rotary)
        else:
            attended = remade(_by_token, self._attend_compressed(*self._turned(q, rotary), *held))
        out: Tensor = self.o_proj(attended)
        return out

    def _turned(self, q: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """What stays and what is turned of the queries of every head, (b, h, t, ·) each."""
        c = self.config
        q_bhtc = q.unflatten(-1, (c.num_attention_heads, -1)).transpose(1, 2)
        q_nope, q_rope = q_bhtc.split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
        return q_nope, rotate(q_rope, *rotary)

    def _attend(self, q: Tensor, latent_btr: Tensor, k_rope_btr: Tensor, rotary: Rotary) -> Tensor:
        """Keys and values of every head are made from the latent, one rotary key serves all: (b, t, h · c_v)."""
        c, heads = self.config, self.config.num_attention_heads
        kv = self.kv_b_proj(latent_btr)
        if compiled.takes(q, kv, k_rope_btr, rotary, heads, heads):
            out: Tensor = compiled.CausalAttention.apply(q, kv, k_rope_btr, *rotary, heads, heads, self.scale)  # type: ignore[no-untyped-call]
            return out
        if _in_one_visit(rotary, q, kv, k_rope_btr):
            return remade(_by_token, causal_attention(*self._by_heads(q, kv, k_rope_btr, rotary), self.scale))
        q_bhtc = torch.cat(self._turned(q, rotary), dim=-1)
        kv_bhtc = kv.unflatten(-1, (heads, -1)).transpose(1, 2)
        k_nope, v = kv_bhtc.split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)
        k = remade(_with_shared, k_nope, rotate(k_rope_btr, *rotary))
        return remade(_by_token, causal_attention(q_bhtc, k, v, self.scale))

    def _by_heads(self, q: Tensor, kv: Tensor, k_rope_btr: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every head, by a kernel; keys are made again, as values lie in kv anyway."""
        from moe_train.kernels import heads  # Triton is not everywhere

        number, width = self.config.num_attention_heads, self.config.v_head_dim
        q_bhtc, k, v = heads.LatentHeads.apply(q, kv, k_rope_btr, *rotary, number)  # type: ignore[no-untyped-call]

        def keys_again(kv: Tensor, rope: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor]:
            return (heads.shared_keys(kv, rope, cos, sin, number, width),)

        made_again((k,), keys_again, kv, k_rope_btr, *rotary)
        return q_bhtc, k, v

    def _attend_compressed(self, q_nope: Tensor, q_rope: Tensor, latent_bsr: Tensor, k_rope_bsr: Tensor) -> Tensor:
        """The same by associativity on the cache as it is: kv_b_proj goes to queries and outputs (section 2.1.2).

        For a few new positions after many cached ones: making keys and values would redo all of these every time. The
        latent serves all heads as one key-value head.
        """
        c = self.config
        weight = self.kv_b_proj.weight.to(q_nope.dtype).unflatten(0, (c.num_attention_heads, -1))
        to_keys, to_values = weight.split((c.qk_nope_head_dim, c.v_head_dim), dim=1)  # (h, c, r) each
        q = torch.cat((q_nope @ to_keys, q_rope), dim=-1)
        latent = latent_bsr.to(q.dtype)
        k = torch.cat((latent, k_rope_bsr.to(q.dtype)), dim=-1).unsqueeze(1)
        mixed_bhtr = causal_attention(q, k, latent.unsqueeze(1), self.scale, grouped=True)
        out_bhtc: Tensor = mixed_bhtr @ to_values.transpose(1, 2)
        return out_bhtc


class GQA(nn.Module):
    """Grouped-query attention, (b, t, d) → (b, t, d); as many key-value heads as heads is multi-head attention."""

    def __init__(self, config: GQAConfig, hidden_size: int, norm_eps: float, scale: float) -> None:
        super().__init__()
        self.config, self.scale = config, scale
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(hidden_size, q_size)
        self.k_proj = Linear(hidden_size, kv_size)
        self.v_proj = Linear(hidden_size, kv_size)
        self.o_proj = Linear(q_size, hidden_size)
        if config.qk_norm is not None:
            per_head = config.qk_norm == "per_head"
            self.q_norm = RMSNorm(config.head_dim if per_head else q_size, eps=norm_eps)
            self.k_norm = RMSNorm(config.head_dim if per_head else kv_size, eps=norm_eps)

    def forward(self, x_btd: Tensor, rotary: Rotary, cache: LayerCache | None = None) -> Tensor:
        x_btd = in_compute_format(x_btd)

        def heads(x: Tensor) -> Tensor:
            x_bhtc: Tensor = x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            return x_bhtc

        q, k, v = of_one_input(x_btd, self.q_proj, self.k_proj, self.v_proj)
        sizes = self.config.num_attention_heads, self.config.num_key_value_heads
        if cache is None and self.config.qk_norm is None and compiled.takes(q, v, k, rotary, *sizes):
            mixed: Tensor = self.o_proj(compiled.CausalAttention.apply(q, v, k, *rotary, *sizes, self.scale))  # type: ignore[no-untyped-call]
            return mixed
        v = heads(v.contiguous())  # it is kept: of a joint product it would keep queries and keys as well
        if cache is None and _in_one_visit(rotary, q, k, v):
            q, k = self._turned(q, k, rotary, v.dtype)
        else:
            if self.config.qk_norm == "all_heads":
                q, k = heads(self.q_norm(q)), heads(self.k_norm(k))
            elif self.config.qk_norm == "per_head":
                q, k = self.q_norm(heads(q)), self.k_norm(heads(k))
            else:
                q, k = heads(q), heads(k)
            q, k = rotate(q, *rotary).to(v.dtype), rotate(k, *rotary).to(v.dtype)
        if cache is not None:
            k, v = cache.extend(k, v)
        grouped = self.config.num_key_value_heads != self.config.num_attention_heads
        attended = causal_attention(q, k, v, self.scale, grouped=grouped)
        out: Tensor = self.o_proj(remade(_by_token, attended))
        return out

    def _turned(self, q: Tensor, k: Tensor, rotary: Rotary, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Queries and keys of every head, turned by a kernel; norms are of features that lie side by side."""
        from moe_train.kernels import heads  # Triton is not everywhere

        if self.config.qk_norm == "all_heads":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (x.unflatten(-1, (-1, self.config.head_dim)) for x in (q, k))
        if self.config.qk_norm == "per_head":
            q, k = self.q_norm(q), self.k_norm(k)
        turned: tuple[Tensor, Tensor] = heads.GroupedHeads.apply(q, k, *rotary, dtype)  # type: ignore[no-untyped-call]
        return turned


def build_attention(model: ModelConfig) -> MLA | GQA:
    attention = model.attention
    if isinstance(attention, MLAConfig):
        return MLA(attention, model.hidden_size, model.rms_norm_eps, softmax_scale(model, attention.qk_head_dim))
    return GQA(attention, model.hidden_size, model.rms_norm_eps, softmax_scale(model, attention.head_dim))
