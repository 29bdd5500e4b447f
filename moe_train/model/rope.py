"""Rotary position embedding (arXiv 2104.09864) and the two ways of stretching it over longer texts.

Both scalings are one change of the frequencies, feature by feature: features that turn many times within the original
length tell neighbours apart and are kept, those that do not complete a turn are slowed down by the factor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moe_train.config import Llama3RopeConfig, MLAConfig, ModelConfig, RopeScalingConfig, YarnConfig

Rotary = tuple[Tensor, Tensor]  # cos, sin: (t, rotary features)


def rotary_dim(model: ModelConfig) -> int:
    """How many features of a head are turned by position."""
    attention = model.attention
    return attention.qk_rope_head_dim if isinstance(attention, MLAConfig) else attention.head_dim


def rotary_frequencies(model: ModelConfig, device: torch.device) -> Tensor:
    """Radians a position by which each pair of rotary features is turned, (rotary features / 2), FP32."""
    dim, theta, scaling = rotary_dim(model), model.rope_theta, model.rope_scaling
    base = theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    if scaling is None:
        return base
    slowed = _slowed(scaling, base, dim, theta)
    return base * (1 - slowed) + base / scaling.factor * slowed


def _slowed(scaling: RopeScalingConfig, base: Tensor, dim: int, theta: float) -> Tensor:
    """How far each pair is slowed: 0 keeps its frequency, 1 divides it by the factor."""
    if isinstance(scaling, YarnConfig):
        return _yarn_ramp(scaling, dim, theta, base.device)
    return _llama3_ramp(scaling, base)


def _yarn_ramp(scaling: YarnConfig, dim: int, theta: float, device: torch.device) -> Tensor:
    """By how often a pair turns within the original length (arXiv 2309.00071, section 3.2)."""

    def pair_that_turns(times: float) -> float:
        return dim * math.log(scaling.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    # Rounded outwards to whole pairs, as in the released code of YaRN and DeepSeek-V3.
    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    pairs = torch.arange(dim // 2, device=device, dtype=torch.float32)
    return ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)


def _llama3_ramp(scaling: Llama3RopeConfig, base: Tensor) -> Tensor:
    turns = scaling.original_max_position_embeddings * base / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return 1 - kept.clamp(0, 1)


def softmax_scale(model: ModelConfig, head_dim: int) -> float:
    """What scores are multiplied by: 1/√head_dim, with YaRN's temperature on top where it is used."""
    scaling = model.rope_scaling
    temperature = 1.0
    if isinstance(scaling, YarnConfig):
        temperature = 0.1 * scaling.mscale * math.log(scaling.factor) + 1.0
    return temperature**2 / math.sqrt(head_dim)


def rotary_tables(positions_t: Tensor, frequencies: Tensor) -> Rotary:
    """cos and sin (t, rotary features) in FP32; the first half of the features is paired with the second."""
    angles = torch.outer(positions_t.float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x_bhtr: Tensor, cos_tr: Tensor, sin_tr: Tensor) -> Tensor:
    """Turn feature i of each position against feature i + r/2 by the position's angle; computed in FP32."""
    out: Tensor = _Rotation.apply(x_bhtr, cos_tr, sin_tr)  # type: ignore[no-untyped-call]
    return out


class _Rotation(torch.autograd.Function):
    """Turned back by the same angle in the backward pass; in place of what autograd would join and negate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad_outputs[0], cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    cos, sin = cos.to(wide.dtype), sin.to(wide.dtype)
    first, second = wide.chunk(2, dim=-1)
    sin_first, sin_second = sin.chunk(2, dim=-1)
    out = wide * cos
    out_first, out_second = out.chunk(2, dim=-1)
    out_first.addcmul_(second, sin_first, value=-direction)
    out_second.addcmul_(first, sin_second, value=direction)
    return out.to(x.dtype)
