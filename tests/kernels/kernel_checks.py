"""What tests of kernels compare with, and how."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_train.kernels.layouts import PIECE, Columns, Rows


def same(found: Tensor, expected: Tensor) -> bool:
    """Bitwise, but for NaN, which has several forms."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[found.element_size()]
    nan = expected.float().isnan()
    equal = found.view(bits) == expected.view(bits)
    return bool(torch.where(nan, found.float().isnan(), equal).all())


def held_to_reference(
    found: tuple[Rows | None, Columns | None], expected: tuple[Rows | None, Columns | None], ends_e: Tensor
) -> None:
    for layout, other in zip(found, expected):
        if layout is None or other is None:
            assert layout is other
            continue
        assert layout.values.dtype == other.values.dtype
        if isinstance(layout, Rows):
            read = slice(0, int(ends_e[-1]))  # what belongs to no group is read by nobody
            assert same(layout.values[read], other.values[read])
            assert same(layout.scales[read], other.scales[read])
        else:
            assert torch.equal(layout.ends_e, other.ends_e)
            pieces = int(layout.ends_e[-1])
            assert same(layout.values[:, : pieces * PIECE], other.values[:, : pieces * PIECE])
            assert same(layout.scales[:, :pieces], other.scales[:, :pieces])


def by_autograd(dh: Tensor, gate_up: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """h, d_gate_up and d_gate in FP64."""
    inputs = [t.double().requires_grad_() for t in (gate_up, gate) if t is not None]
    g, u = inputs[0].chunk(2, -1)
    h = g * torch.sigmoid(g) * u * (inputs[1] if gate is not None else 1)
    d_gate_up, *d_gate = torch.autograd.grad(h, inputs, dh.double())
    return h.detach(), d_gate_up, d_gate[0] if d_gate else None


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-9)).item()


def allowed(torchs: Tensor, exact: Tensor, count: int | None = None) -> float:
    """The error of torch's operations, which round more often, and what chance makes of it for so many (numbers)."""
    return (1.05 + (count or exact.numel()) ** -0.5) * error(torchs, exact) + 2**-12


def floor(exact: Tensor) -> float:
    """Of products in BF16 one after another, and what chance, or terms that cancel, make of it for so many numbers."""
    return 0.01 + 0.04 * exact.numel() ** -0.5


def drawn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def count_calls(monkeypatch: pytest.MonkeyPatch, module: ModuleType, names: tuple[str, ...], made: list[str]) -> None:
    """The module's functions put their names into `made` when they are called."""

    def counted(name: str, call: Any) -> Any:
        def function(*args: Any) -> Any:
            made.append(name)
            return call(*args)

        return function

    for name in names:
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
