"""The small parts: linear without bias, dense SwiGLU.

Shape suffixes throughout the model: b sequences, t positions, d hidden size, h heads, e experts, k experts a token
visits, n token-expert pairs, f expert width, v vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_train.precision.fp8 import Fp8Layer
from moe_train.precision.matmul import linear, linears, swiglu_linear


class Linear(nn.Module):
    """y = x Wᵀ without bias; weight (out, in)."""

    fp8: Fp8Layer | None = None  # given by precision/recipes.py
    evaluates_in_fp8 = False

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.products)

    @property
    def products(self) -> Fp8Layer | None:
        """Of FP8, where it multiplies in FP8 now."""
        return self.fp8 if self.training or self.evaluates_in_fp8 else None


def of_one_input(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """What each makes of x; together, where none multiplies in FP8."""
    if any(layer.products is not None for layer in layers):
        return tuple(layer(x) for layer in layers)
    return linears(x, *(layer.weight for layer in layers))


class SwiGLU(nn.Module):
    """down(silu(gate x) · up x), (…, d) → (…, d) (arXiv 2002.05202); gate and up are one product."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.gate_up_proj, self.down_proj
        fp8 = None if first.products is None or second.products is None else (first.products, second.products)
        return swiglu_linear(x, first.weight, second.weight, fp8=fp8)
