"""The small parts: linear without bias, dense SwiGLU, rotary position embedding.

Shape suffixes throughout the model: b sequences, t positions, d hidden size, h heads, e experts, k experts a token
visits, n token-expert pairs, f expert width, v vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.precision.matmul import linear


class Linear(nn.Module):
    """y = x Wᵀ without bias; weight (out, in)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) · weight (arXiv 1910.07467), in the format of the weight (FP32) whatever that of x."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class SwiGLU(nn.Module):
    """down(silu(gate x) · up x), (…, d) → (…, d) (arXiv 2002.05202); gate and up are one product."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(F.silu(gate) * up)
        return out


def rotary_tables(positions_t: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (t, dim) in FP32 of `dim` rotary features (arXiv 2104.09864), first half paired with second."""
    frequencies = theta ** (-torch.arange(0, dim, 2, device=positions_t.device, dtype=torch.float32) / dim)
    angles = torch.outer(positions_t.float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x_bhtr: Tensor, cos_tr: Tensor, sin_tr: Tensor) -> Tensor:
    """Turn feature i of each position against feature i + r/2 by the position's angle; computed in FP32."""
    first, second = x_bhtr.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x_bhtr * cos_tr + turned * sin_tr).to(x_bhtr.dtype)
