"""RMSNorm (arXiv 1910.07467): x / rms(x) · weight, over the last dimension, alone or of a sum on the residual stream.

On a GPU `gpu_norm` does it in one visit, the addition before it and the rounding after it included, as `kernels/cpu`
does on a CPU in BF16; what they do not take torch has as one kernel on CUDA. Elsewhere torch composes it of five
operations and keeps three tensors of the input's size; here the input is kept, with a number a row, and both passes go
over memory about half as often.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.kernels.cpu import norm as compiled
from moe_train.model import gpu_norm
from moe_train.precision.formats import compute_dtype
from moe_train.precision.remade import in_compute_format, made_again, remade


class RMSNorm(nn.Module):
    """(…, features) in any format → in that of the weight (FP32)."""

    def __init__(self, features: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if gpu_norm.takes(x, self.weight):
            exact: Tensor = gpu_norm.NormOfSum.apply(x, None, self.weight, self.eps, None, True)[2]  # type: ignore[no-untyped-call]
            return exact
        if x.is_cuda:
            return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)
        out: Tensor = _Norm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return out


class Normed(NamedTuple):
    """A sum on the residual stream, and its norm."""

    total: Tensor  # in FP32
    exact: Tensor  # in FP32 where that was asked for
    rounded: Tensor | None  # as products read it, where it is there already

    @property
    def narrow(self) -> Tensor:
        """As products read it."""
        return in_compute_format(self.exact) if self.rounded is None else self.rounded


def normed(norm: RMSNorm, x: Tensor, added: Tensor | None = None, *, exact: bool = False) -> Normed:
    """The norm of x + added (…, features). Without `exact` that norm may be the rounded one. Neither is kept."""
    if gpu_norm.takes(x, norm.weight, added):
        return _normed_on_gpu(norm, x, added, exact)
    if compute_dtype(x) is torch.bfloat16 and compiled.takes(x, norm.weight, added):
        total, narrow, wide = compiled.NormOfSum.apply(x, added, norm.weight, norm.eps, exact)  # type: ignore[no-untyped-call]
        results = (narrow, wide) if exact else (narrow,)
        made_again(results, lambda each: compiled.again(each, norm.weight, norm.eps, exact), total)
        return Normed(total, results[-1], narrow)
    total = x if added is None else x + added
    wide = remade(norm, total)
    return Normed(total, wide, None)


def _normed_on_gpu(norm: RMSNorm, x: Tensor, added: Tensor | None, exact: bool) -> Normed:
    dtype = compute_dtype(norm.weight)
    rounds = None if dtype == norm.weight.dtype else dtype
    exact = exact or rounds is None
    total, narrow, wide, scale = gpu_norm.NormOfSum.apply(x, added, norm.weight, norm.eps, rounds, exact)  # type: ignore[no-untyped-call]

    def again(total: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return _there(*gpu_norm.again(total, scale, norm.weight, rounds, exact))

    results = _there(narrow, wide)
    made_again(results, again, total, scale)
    return Normed(total, results[-1], narrow)


def _there(*norms: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(each for each in norms if each is not None)


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
