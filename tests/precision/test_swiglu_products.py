"""A SwiGLU between its products: the gradients of plain autograd to the bit, and its input alone is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from moe_train.compose import CONFIGS, validated
from moe_train.config import PrecisionConfig
from moe_train.precision.emulated import Emulated
from moe_train.precision.fp8 import Fp8Layer
from moe_train.precision.matmul import grouped_linear, swiglu_linear

ENDS = torch.tensor([5, 5, 70], dtype=torch.int32)
ROWS, INNER, WIDTH = 70, 160, 136


def leaves() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (ROWS, INNER), (3, 2 * WIDTH, INNER), (3, INNER, WIDTH), (ROWS, 1)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def plain(x: Tensor, first: Tensor, second: Tensor, row_weight: Tensor) -> Tensor:
    gate, up = grouped_linear(x, first, ENDS).chunk(2, dim=-1)
    gate = gate.contiguous()  # torch's silu rounds differently on rows that lie apart
    return grouped_linear(F.silu(gate) * up * row_weight.to(gate.dtype), second, ENDS)


def recomputed(x: Tensor, first: Tensor, second: Tensor, row_weight: Tensor) -> Tensor:
    return swiglu_linear(x, first, second, row_weight=row_weight, ends_e=ENDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_and_gradients_are_those_of_autograd_to_the_bit(dtype: torch.dtype) -> None:
    found = []
    for function in (plain, recomputed):
        inputs = leaves()
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            y = function(*inputs)
        y.float().square().sum().backward()
        found.append([y.detach(), *(leaf.grad for leaf in inputs)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_only_the_input_of_the_swiglu_is_kept() -> None:
    inputs, kept = leaves(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        recomputed(*inputs)
    own = {leaf.data_ptr() for leaf in inputs}
    made = [t for t in kept if t.data_ptr() not in own and t.dtype.is_floating_point]
    assert [tuple(t.shape) for t in made] == [(ROWS, 2 * WIDTH)]


@pytest.mark.parametrize(("recipe", "one_byte"), [("fp8_deepseek", True), ("fp8_rowwise", False)])
def test_a_recipe_keeps_it_in_fp8_or_leaves_it_wide(recipe: str, one_byte: bool) -> None:
    content = yaml.safe_load((CONFIGS / f"precision/{recipe}.yaml").read_text())
    fp8 = validated(PrecisionConfig, content, recipe).fp8
    assert fp8 is not None
    layers = Fp8Layer(fp8, Emulated()), Fp8Layer(fp8, Emulated())
    (x, first, second, row_weight), kept = leaves(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = swiglu_linear(x, first, second, row_weight=row_weight, ends_e=ENDS, fp8=layers)
    (gate_up,) = [t for t in kept if t.shape == (ROWS, 2 * WIDTH)]
    assert (gate_up.element_size() == 1) is one_byte
    y.square().sum().backward()
    exact = leaves()
    plain(*exact).square().sum().backward()
    for leaf, other in zip((x, first, second, row_weight), exact, strict=True):
        assert leaf.grad is not None
        assert other.grad is not None
        noise = (leaf.grad - other.grad).norm()
        assert 20 * torch.log10(other.grad.norm() / noise) > 18  # decibels: four roundings in a row


def test_compiled_in_fp8_there_is_no_graph_break_and_the_same_result() -> None:
    content = yaml.safe_load((CONFIGS / "precision/fp8_deepseek.yaml").read_text())
    fp8 = validated(PrecisionConfig, content, "fp8_deepseek").fp8
    assert fp8 is not None
    layers = Fp8Layer(fp8, Emulated()), Fp8Layer(fp8, Emulated())

    def experts(x: Tensor, first: Tensor, second: Tensor, row_weight: Tensor) -> Tensor:
        return swiglu_linear(x, first, second, row_weight=row_weight, ends_e=ENDS, fp8=layers)

    found = []
    for function in (experts, torch.compile(experts, fullgraph=True, backend="aot_eager")):
        inputs = leaves()
        y = function(*inputs)
        y.square().sum().backward()
        found.append([y.detach(), *(leaf.grad for leaf in inputs)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
