"""Rows of tokens in FP8 that are read by an index: bit for bit what copies of them give, and no copy is made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import yaml
from torch import Tensor

pytest.importorskip("triton")

from kernel_checks import held_to_reference, same

from moe_train.compose import CONFIGS, validated
from moe_train.config import MoEConfig, OperandConfig, PrecisionConfig
from moe_train.kernels import fp8_matmul, quantize
from moe_train.kernels.layouts import Rows
from moe_train.model import dispatch
from moe_train.model.experts import MoELayer
from moe_train.precision.fp8 import Fp8Layer
from moe_train.precision.remade import remade, remaking
from moe_train.precision.triton_backend import Triton

FORMATS = ("e4m3", "e5m2")


@pytest.fixture
def source_n(ragged: tuple[int, Tensor], device: torch.device) -> Tensor:
    """Of as many rows as `ragged` has, among 90 tokens: some of them often, in no order."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(90, (ragged[0],), generator=generator).to(device)


@pytest.mark.parametrize("scale_of", ["tile", "block", "row", "tensor"])
def test_rows_are_rounded_where_they_lie(
    scale_of: str, ragged: tuple[int, Tensor], source_n: Tensor, random: Callable[..., Tensor]
) -> None:
    _, ends_e = ragged
    x = random(90, 200, dtype=torch.bfloat16)
    one, other = (OperandConfig(format, scale_of, False) for format in FORMATS)  # type: ignore[arg-type]
    found = quantize.quantize_tokens(x, source_n, ends_e, rows=one, columns=other)
    held_to_reference(found, quantize.quantize(x[source_n], ends_e, rows=one, columns=other), ends_e)


@pytest.mark.parametrize("scale_of", ["tile", "row"])
def test_rows_that_are_kept_once_are_rounded_again_where_they_lie(
    scale_of: str, ragged: tuple[int, Tensor], source_n: Tensor, random: Callable[..., Tensor]
) -> None:
    _, ends_e = ragged
    operand = OperandConfig("e4m3", scale_of, False)  # type: ignore[arg-type]
    rows = _rounded(random(90, 200), operand)
    found = quantize.quantize_tokens_again(rows, source_n, ends_e, operand)
    expected = quantize.quantize_again(_copied(rows, source_n), ends_e, operand)
    held_to_reference((None, found), (None, expected), ends_e)


@pytest.mark.parametrize("k", [128, 200])
def test_rows_are_multiplied_where_they_lie(
    k: int, ragged: tuple[int, Tensor], source_n: Tensor, random: Callable[..., Tensor]
) -> None:
    _, ends_e = ragged
    tile, block = OperandConfig("e4m3", "tile", False), OperandConfig("e4m3", "block", False)
    rows = _rounded(random(90, k), tile)
    weights, _ = quantize.round_weights(random(len(ends_e), 70, k), block, None)
    assert weights is not None
    found = fp8_matmul.grouped_product(rows, weights, ends_e, torch.bfloat16, source_n)
    assert same(found, fp8_matmul.grouped_product(_copied(rows, source_n), weights, ends_e, torch.bfloat16))


@pytest.mark.parametrize("recipe", ["fp8_deepseek", "fp8_rowwise"])
@pytest.mark.parametrize("remakes", [False, True])
def test_experts_give_the_same_without_copies_of_rows(
    recipe: str,
    remakes: bool,
    device: torch.device,
    random: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Outputs, and gradients of the input, the router and every weight."""
    config = MoEConfig(
        num_experts=3, top_k=2, num_shared_experts=1, moe_intermediate_size=40, first_k_dense_replace=0,
        routing="token_choice", scoring_func="sigmoid", n_group=1, topk_group=1, group_score_top_k=2,
        norm_topk_prob=True, routed_scaling_factor=2.5, capacity_factor=None, bias_update_speed=0.01,
        bias_update_fraction=1.0, sequence_loss_weight=0.0, batch_loss_weight=0.0, router_z_loss_weight=0.0,
    )  # fmt: skip
    layer = MoELayer(config, 144).to(device)
    for index, parameter in enumerate(layer.parameters()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator(device).manual_seed(index))
    own = validated(PrecisionConfig, yaml.safe_load((CONFIGS / f"precision/{recipe}.yaml").read_text()), recipe).fp8
    assert own is not None
    layer.experts.fp8 = Fp8Layer(own, Triton("float32")), Fp8Layer(own, Triton("float32"))
    x = random(2, 15, 144).requires_grad_()
    grad = random(2, 15, 144)
    leaves = [x, *layer.parameters()]
    copies: list[Tensor] = []
    to_experts = dispatch.to_experts

    def copied(x_td: Tensor, plan: dispatch.Plan) -> Tensor:
        copies.append(to_experts(x_td, plan))
        return copies[-1]

    monkeypatch.setattr(dispatch, "to_experts", copied)

    def results() -> list[Tensor]:
        with remaking(remakes):
            y, _ = layer(remade(lambda x: 2 * x, x))
            return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    found = results()
    assert not copies
    monkeypatch.setattr(Fp8Layer, "reads_tokens", False)
    expected = results()
    assert copies
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def _rounded(x: Tensor, operand: OperandConfig) -> Rows:
    ends = torch.tensor([len(x)], dtype=torch.int32, device=x.device)
    rows, _ = quantize.quantize(x, ends, rows=operand, columns=None)
    assert rows is not None
    return rows


def _copied(rows: Rows, source_n: Tensor) -> Rows:
    return Rows(rows.values.view(torch.uint8)[source_n].view(rows.values.dtype), rows.scales[source_n])
