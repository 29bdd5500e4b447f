"""RMSNorm (arXiv 1910.07467): x / rms(x) · weight, over the last dimension.

CUDA has it as one kernel. Elsewhere torch composes it of five operations and keeps three tensors of the input's size;
here the input is kept, with a number a row, and both passes go over memory about half as often.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """(…, features) in any format → in that of the weight (FP32)."""

    def __init__(self, features: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)
        out: Tensor = _Norm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(weight.dtype)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = (norm.square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        out: Tensor = (wide * scale).mul_(weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        """With s = 1/rms(x) and p = dy·x:  dweight = Σ_rows s·p,  dx = s·dy·weight - x·s³·(p·weight)/features."""
        x, weight, scale = ctx.saved_tensors
        shape, own = x.shape, x.dtype
        x, grad, scale = (each.reshape(-1, each.shape[-1]) for each in (x.to(weight.dtype), grad_outputs[0], scale))
        with torch.autocast(x.device.type, enabled=False):
            product = grad * x
            along = torch.mv(product, weight).unsqueeze(1).mul_(scale.pow(3)).div_(-shape[-1])
            grad_weight = torch.mv(product.t(), scale.squeeze(1))
            grad_x = torch.mul(grad, weight, out=product).mul_(scale).addcmul_(x, along)
        return grad_x.view(shape).to(own), grad_weight, None
