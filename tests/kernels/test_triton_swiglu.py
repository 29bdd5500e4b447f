"""SwiGLU in Triton against autograd in FP64; its FP8 forms bit for bit the rounding of its numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernel_checks import by_autograd, error, floor, held_to_reference

from moe_train.config import OperandConfig
from moe_train.kernels import reference, swiglu
from moe_train.precision import support
from moe_train.precision.matmul import swiglu_linear

TILE, BLOCK = OperandConfig("e4m3", "tile", True), OperandConfig("e5m2", "block", True)
ROW = OperandConfig("e4m3", "row", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [True, False])
def test_values_and_gradients_are_those_of_fp64_rounded(
    dtype: torch.dtype, gated: bool, random: Callable[..., Tensor]
) -> None:
    n, f = (40, 150) if random(1).device.type == "cpu" else (5000, 1408)
    gate_up, dh = 3 * random(n, 2 * f, dtype=dtype), random(n, f, dtype=dtype)
    gate = random(n, 1).sigmoid() if gated else None
    h, d_gate_up, d_gate = by_autograd(dh, gate_up, gate)
    found = swiglu.swiglu(gate_up, gate)
    d_found, d_gate_found = swiglu.swiglu_backward(dh, gate_up, gate)
    assert found.dtype == d_found.dtype == dtype
    d_again, d_gate_again, h_again = swiglu.swiglu_backward_and_forward(dh, gate_up, gate)
    assert torch.equal(h_again, found)
    assert torch.equal(d_again, d_found)
    if d_gate_again is not None and d_gate_found is not None:
        assert torch.equal(d_gate_again, d_gate_found)
    # Half a unit of the format, and FP32's error, which grows where 1 + g (1 - s) cancels.
    relative, absolute = torch.finfo(dtype).eps / 2 + 1e-6, 1e-5 if dtype == torch.float32 else 1e-4
    torch.testing.assert_close(found.double(), h, rtol=relative, atol=absolute)
    torch.testing.assert_close(d_found.double(), d_gate_up, rtol=relative, atol=absolute)
    if d_gate is not None and d_gate_found is not None:
        assert d_gate_found.dtype == torch.float32
        torch.testing.assert_close(d_gate_found.double(), d_gate, rtol=1e-5, atol=1e-4)
    else:
        assert d_gate_found is None


@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [(TILE, BLOCK, torch.bfloat16), (None, TILE, torch.float32), (ROW, None, torch.bfloat16)],
)
def test_rounding_in_the_same_pass_changes_no_bit(
    rows: OperandConfig | None,
    columns: OperandConfig | None,
    dtype: torch.dtype,
    ragged: tuple[int, Tensor],
    random: Callable[..., Tensor],
) -> None:
    n, ends_e = ragged
    for f in (128, 72) if n < 1000 else (1408, 1000):
        gate_up, dh, gate = random(n, 2 * f, dtype=dtype), random(n, f, dtype=dtype), random(n, 1).sigmoid()
        if rows:
            h = swiglu.swiglu_quantize(gate_up, gate, ends_e, rows)
            expected = reference.quantize(swiglu.swiglu(gate_up, gate), ends_e, rows=rows, columns=None)
            held_to_reference((h, None), expected, ends_e)
        *found, d_gate = swiglu.swiglu_backward_quantize(dh, gate_up, gate, ends_e, rows=rows, columns=columns)
        d_gate_up, d_gate_expected = swiglu.swiglu_backward(dh, gate_up, gate)
        expected = reference.quantize(d_gate_up, ends_e, rows=rows, columns=columns)
        held_to_reference((found[0], found[1]), expected, ends_e)
        read = slice(0, int(ends_e[-1]))
        torch.testing.assert_close(d_gate[read], d_gate_expected[read], rtol=1e-5, atol=1e-4)


def test_shapes_that_do_not_fit_are_said(random: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="7 columns"):
        swiglu.swiglu(random(3, 7), None)
    with pytest.raises(ValueError, match="one number for each of 3 rows"):
        swiglu.swiglu(random(3, 8), random(3))
    with pytest.raises(ValueError, match="dh: 3 rows of 4"):
        swiglu.swiglu_backward(random(3, 8), random(3, 8), None)


@pytest.mark.parametrize("grouped", [True, False])
def test_both_products_with_it_are_those_of_float64_rounded(
    grouped: bool, random: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    n, d, f = (45, 24, 40) if random(1).device.type == "cpu" else (3000, 512, 264)
    ends_e = torch.tensor([n // 3, n // 3, n], dtype=torch.int32, device=random(1).device) if grouped else None
    stack = (3,) if grouped else ()
    inputs = [random(n, d), random(*stack, 2 * f, d) * d**-0.5, random(*stack, d, f) * f**-0.5]
    inputs += [random(n, 1).sigmoid()] if grouped else []
    grad = random(n, d)
    found = []
    for kernel in (False, True):
        monkeypatch.setattr(support, "runs_triton", lambda _, kernel=kernel: kernel)
        leaves = [each.clone().requires_grad_() for each in inputs]
        with torch.autocast(grad.device.type, torch.bfloat16):
            y = swiglu_linear(*leaves[:3], row_weight=leaves[3] if grouped else None, ends_e=ends_e)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))])
    exact_leaves = [each.double().requires_grad_() for each in inputs]
    x, first, second, *weight = exact_leaves
    ends = [n] if ends_e is None else ends_e.tolist()
    parts, start = [], 0
    for e, end in enumerate(ends):
        w1, w2 = (first[e], second[e]) if grouped else (first, second)
        g, u = (x[start:end] @ w1.mT).chunk(2, -1)
        parts.append((torch.nn.functional.silu(g) * u * (weight[0][start:end] if grouped else 1)) @ w2.mT)
        start = end
    y = torch.cat(parts)
    exact = [y.detach(), *torch.autograd.grad(y, exact_leaves, grad.double())]
    for with_kernel, without, right in zip(found[1], found[0], exact, strict=True):
        assert with_kernel.dtype == without.dtype
        assert error(with_kernel, right) <= floor(right)
        assert error(without, right) <= floor(right)
