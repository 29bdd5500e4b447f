"""What FP8 does to operands is counted as a loop over single numbers would count it, and a sick layer is named."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes_by_name import precision, recipe
from torch import Tensor

from moe_train.compose import CONFIGS
from moe_train.config import OperandConfig
from moe_train.errors import UserError
from moe_train.kernels.layouts import Rows
from moe_train.model.transformer import Transformer
from moe_train.precision import health, recipes
from moe_train.precision.emulated import Emulated
from moe_train.precision.fp8 import Fp8Layer, holding_weights
from moe_train.precision.fp8_swiglu import fp8_swiglu
from moe_train.precision.health import Counts, LayerRates, Operand, Rates
from moe_train.training.fp8_health import excesses, where_not_finite

CPU = torch.device("cpu")
OPERANDS = [
    OperandConfig(format, scale_of, power)
    for format in ("e4m3", "e5m2")
    for scale_of in ("tile", "block", "row", "tensor")
    for power in (False, True)
]
# Of |x| / scale: at most the first is zero (half of the smallest number), beyond the second is cut off.
BOUNDS = {"e4m3": (2.0**-10, 464.0), "e5m2": (2.0**-17, 61440.0)}


def by_loop(x: Tensor, scales: Tensor, format: str) -> list[int]:
    """Counts by the definition: of x (n, k) and the scale of each number, without looking at any FP8 value."""
    smallest, largest = BOUNDS[format]
    nonzero = underflow = saturated = not_finite = 0
    for value, scale in zip(x.flatten().tolist(), scales.flatten().tolist(), strict=True):
        if not math.isfinite(value):
            not_finite += 1
        elif value:
            ratio = float(np.float32(abs(value)) / np.float32(scale))
            nonzero += 1
            underflow += ratio <= smallest
            saturated += ratio > largest
    return [nonzero, underflow, saturated, x.numel(), not_finite]


def counted(count: Callable[[Tensor], None], operand: Operand = "input") -> list[int]:
    counts = torch.zeros(len(health.OPERANDS), 5, dtype=torch.float64)
    count(counts)
    found: list[int] = counts[health.OPERANDS.index(operand)].int().tolist()
    assert counts.sum() == sum(found)  # the other operands' are untouched
    return found


def spread(scales: Tensor, inner: int) -> Tensor:
    return scales.repeat_interleave(128, -1)[..., :inner]


numbers = st.one_of(
    st.floats(width=32),  # NaN, infinities and denormals among them
    st.sampled_from([0.0, -0.0, 1.0, -448.0, 2.0**-9, 2.0**-10, 2.0**-17, 1e-45, -1e-40, 3.4e38, math.inf, math.nan]),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(numbers, min_size=1, max_size=12), st.sampled_from(OPERANDS), st.integers(1, 3))
def test_any_numbers_are_counted_as_by_hand_along_rows_along_tokens_and_as_weights(
    row: list[float], operand: OperandConfig, first: int
) -> None:
    x = torch.tensor([row, row[::-1], [1.0] * len(row), [0.0] * len(row)])
    ends = torch.tensor([first, first, 4], dtype=torch.int32)  # three groups, one of them empty
    rows, columns = Emulated.quantize(x, ends, rows=operand, columns=operand)
    assert rows is not None
    assert columns is not None
    assert counted(lambda into: health.count_rows(into, "input", x, rows, ends)) == by_loop(
        x, spread(rows.scales, len(row)), operand.format
    )
    # Each group is a piece of tokens here, since it is smaller than 128.
    scales = torch.cat([columns.scales[:, :1].mT.expand(first, -1), columns.scales[:, 1:2].mT.expand(4 - first, -1)])
    assert counted(lambda into: health.count_columns(into, "input", x, columns, ends)) == by_loop(
        x, scales, operand.format
    )
    weights, _ = Emulated.round_weights(x.view(2, 2, -1), operand, None)
    assert weights is not None
    assert counted(lambda into: health.count_weights(into, x.view(2, 2, -1), weights), "weight") == by_loop(
        x, spread(weights.scales, len(row)), operand.format
    )


@pytest.mark.parametrize("operand", OPERANDS, ids=lambda o: f"{o.format}-{o.scale_of}-{o.power_of_two}")
def test_rows_of_no_group_are_not_counted_and_groups_longer_than_a_piece_are(operand: OperandConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 140, generator=generator) * 10 ** (8 * torch.rand(150, 140, generator=generator) - 8)
    x[3, 5], x[149] = math.inf, math.nan  # the last row belongs to no group
    x[:, 130:] = 0
    ends = torch.tensor([0, 131, 148], dtype=torch.int32)
    rows, columns = Emulated.quantize(x, ends, rows=operand, columns=operand)
    assert rows is not None
    assert columns is not None
    inside = x[:148]
    along_rows = by_loop(inside, spread(rows.scales[:148], 140), operand.format)
    assert counted(lambda into: health.count_rows(into, "input", x, rows, ends)) == along_rows
    place = torch.tensor([*[0] * 128, *[1] * 3, *[2] * 17])  # the piece of each token: groups begin at a piece
    along_tokens = by_loop(inside, columns.scales.mT[place], operand.format)
    assert counted(lambda into: health.count_columns(into, "gradient", x, columns, ends), "gradient") == along_tokens
    assert along_rows[1] > 0
    assert along_rows[4] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets the kernels; -m gpu runs them")
@pytest.mark.parametrize("scale_of", ["tile", "row"])
def test_what_the_projects_kernels_round_is_counted_alike(scale_of: str) -> None:
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    from moe_train.precision.triton_backend import Triton

    operand = OperandConfig("e4m3", scale_of, False)  # type: ignore[arg-type]
    x = torch.randn(150, 140, generator=torch.Generator().manual_seed(0))
    x[:, ::3], x[3, 5] = x[:, ::3] * 1e-7, math.nan
    x[::4] *= 1e-7
    ends, found = torch.tensor([0, 131, 148], dtype=torch.int32), []
    for backend in (Emulated(), Triton("float32")):
        rows, columns = backend.quantize(x, ends, rows=operand, columns=operand)
        weights, turned = backend.round_weights(x.unsqueeze(0), operand, operand)
        assert rows is not None
        assert columns is not None
        assert weights is not None
        assert turned is not None
        into = torch.zeros(len(health.OPERANDS), 5, dtype=torch.float64)
        health.count_rows(into, "input", x, rows, ends)
        health.count_columns(into, "gradient", x, columns, ends)
        health.count_weights(into, x.unsqueeze(0), weights)
        health.count_weights(into, x.mT.unsqueeze(0), turned)
        found.append(into)
    assert torch.equal(*found)
    assert found[0][:3, 1].gt(0).all()


def test_scales_of_the_moment_cut_nothing_off_and_older_ones_are_seen_to() -> None:
    x = torch.tensor([[1.0, 100.0, 1000.0, -2000.0, 0.0]])
    ends = torch.tensor([1], dtype=torch.int32)
    now, _ = Emulated.quantize(x, ends, rows=OPERANDS[0], columns=None)
    assert now is not None
    assert counted(lambda into: health.count_rows(into, "input", x, now, ends))[2] == 0
    old = Rows((x / 2).clamp(-448, 448).to(torch.float8_e4m3fn), torch.tensor([[2.0]]))  # of a largest value of 896
    assert counted(lambda into: health.count_rows(into, "input", x, old, ends)) == [4, 0, 2, 5, 0]


def swiglu_of(layers: tuple[Fp8Layer, Fp8Layer], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (20, 24), (3, 32, 24), (3, 24, 16), (20, 1)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    with holding_weights(), torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        y = fp8_swiglu(*leaves, torch.tensor([7, 7, 18], dtype=torch.int32), layers)
        y[:18].sum().backward()
    return [y.detach()[:18], *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["fp8_deepseek", "fp8_rowwise"])
def test_counting_changes_no_result_and_finds_every_operand(name: str, dtype: torch.dtype) -> None:
    layers = Fp8Layer(recipe(name), Emulated()), Fp8Layer(recipe(name), Emulated())
    counts = Counts({"up": layers[0], "down": layers[1]}, CPU)
    plain = swiglu_of(layers, dtype)
    assert not counts.take().any()  # outside of `counting`
    with counts.counting():
        seen = swiglu_of(layers, dtype)
    assert all(torch.equal(one, other) for one, other in zip(plain, seen, strict=True))
    found = counts.rates(counts.take())
    assert set(found["up"]) == set(health.OPERANDS) - ({"swiglu_input"} if name == "fp8_rowwise" else set())
    assert set(found["down"]) == {"input", "weight", "gradient"}
    assert not counts.take().any()
    swiglu_of(layers, dtype)
    assert not counts.take().any()


TOKENS = torch.randint(0, 64, (2, 4, 32), generator=torch.Generator().manual_seed(0))


def rates_of(model: Transformer, pieces: int = 1) -> LayerRates:
    """Of one training step's forward and backward passes, in so many micro-batches."""
    counts = Counts(recipes.fp8_layers(model), CPU)
    model.train()
    with holding_weights(), counts.counting():
        for tokens, targets in zip(*(part.chunk(pieces) for part in TOKENS), strict=True):
            model(tokens, targets, 0.3).objective.backward()
    return counts.rates(counts.take())


@pytest.fixture
def model(small_model: Callable[..., Transformer]) -> Transformer:
    made = small_model("mtp=depth_1", dtype=torch.float32)
    recipes.apply(made, precision("fp8_deepseek"), CPU)
    return made


def test_every_layer_of_the_blocks_and_of_mtp_modules_has_rates_and_a_fresh_model_is_healthy(
    model: Transformer,
) -> None:
    rates = rates_of(model)
    assert "mtp.0.join_proj" in rates
    assert "blocks.1.ffn.experts.down_proj" in rates
    for by_operand in rates.values():
        assert {"input", "weight", "gradient"} <= set(by_operand)
    limits = precision("fp8_deepseek").health
    assert limits is not None
    assert excesses(rates, limits.__dict__) == []


def test_a_weight_of_too_wide_a_range_is_named(model: Transformer) -> None:
    with torch.no_grad():
        model.blocks[1].attention.o_proj.weight[0, 0] = 1e7  # type: ignore[union-attr, index]
    of_weights = {name: by_operand["weight"].underflow_rate for name, by_operand in rates_of(model).items()}
    assert of_weights.pop("blocks.1.attention.o_proj") > 0.99
    assert max(of_weights.values()) < 0.01


def test_an_infinite_gradient_is_named_where_it_began(model: Transformer) -> None:
    assert where_not_finite(rates_of(model)) is None
    layer = model.blocks[1].attention.o_proj
    layer.register_forward_hook(lambda *given: given[2].register_hook(lambda grad: grad * math.inf) and None)
    assert where_not_finite(rates_of(model)) == "the gradient of blocks.1.attention.o_proj"
    with torch.no_grad():
        model.blocks[1].ffn.experts.gate_up_proj[3, 0, 0] = math.nan  # type: ignore[union-attr, index]
    assert where_not_finite(rates_of(model)) == "the weight of blocks.1.ffn.experts.gate_up_proj"


def test_micro_batches_and_recomputed_activations_leave_shares_shares(small_model: Callable[..., Transformer]) -> None:
    found = []
    for recomputes, pieces in ((False, 1), (True, 1), (False, 2)):
        made = small_model(dtype=torch.float32)
        made.activation_checkpointing = recomputes
        recipes.apply(made, precision("fp8_tensorwise"), CPU)
        found.append(rates_of(made, pieces))
    whole, recomputed, cut = found
    for layer, by_operand in whole.items():
        assert recomputed[layer]["gradient"] == by_operand["gradient"]
        assert recomputed[layer]["weight"] == cut[layer]["weight"] == by_operand["weight"]
        for operand, rates in by_operand.items():
            # Micro-batches have tensors, and so scales, of their own.
            assert cut[layer][operand].underflow_rate == pytest.approx(rates.underflow_rate, rel=1, abs=2e-3)
            assert recomputed[layer][operand].underflow_rate == pytest.approx(rates.underflow_rate, rel=1, abs=2e-3)


def test_a_module_that_goes_back_multiplies_as_without_a_recipe_and_the_table_says_which(
    small_model: Callable[..., Transformer],
) -> None:
    plain, narrow = (small_model(dtype=torch.float32) for _ in range(2))
    recipes.apply(narrow, precision("fp8_deepseek"), CPU)
    modules = {recipes.module_of(layer) for layer in recipes.fp8_layers(narrow)}
    assert {
        "blocks.0.ffn",
        "blocks.1.ffn.experts",
        "blocks.1.ffn.shared_experts",
        "blocks.2.attention.o_proj",
    } < modules
    recipes.to_compute_format(narrow, ["blocks.1.ffn.experts", "blocks.2.attention.o_proj"])
    rows = {row["layer"]: row for row in recipes.table(narrow, torch.bfloat16, torch.device("cpu"))}
    assert rows["attention.o_proj"]["but"] == {"blocks.2.attention.o_proj": "bfloat16"}
    assert rows["ffn.experts.down_proj"]["but"] == {"blocks.1.ffn.experts.down_proj": "bfloat16"}
    assert "but" not in rows["ffn.shared_experts.down_proj"]
    assert "blocks.1.ffn.experts.down_proj" not in recipes.fp8_layers(narrow)
    assert not torch.equal(narrow(*TOKENS).nll, plain(*TOKENS).nll)
    recipes.to_compute_format(narrow, modules)
    assert torch.equal(narrow(*TOKENS).nll, plain(*TOKENS).nll)
    assert {row.get("all") for row in recipes.table(narrow, torch.bfloat16, torch.device("cpu"))} >= {"bfloat16"}
    assert not any("forward" in row for row in recipes.table(narrow, torch.bfloat16, torch.device("cpu")))


def test_a_rate_is_beyond_its_limit_when_it_is_above_it_and_no_limit_allows_any() -> None:
    rates: LayerRates = {"one": {"input": Rates(0.2, 0.0, 0.0)}, "two": {"gradient": Rates(0.1, 0.0, 1e-9)}}
    limits = {"max_underflow_rate": 0.1, "max_saturation_rate": 0.0, "max_nonfinite_rate": 0.0}
    assert [(e.layer, e.rate) for e in excesses(rates, limits)] == [
        ("one", "underflow_rate"),
        ("two", "nonfinite_rate"),
    ]
    assert [e.layer for e in excesses(rates, limits | {"max_nonfinite_rate": None})] == ["one"]


def test_limits_without_fp8_are_refused_with_the_remedy() -> None:
    limits = yaml.safe_load((CONFIGS / "precision/fp8_deepseek.yaml").read_text())["health"]
    with pytest.raises(UserError, match="health says what FP8 may lose, and precision=bf16 has no FP8: leave it null"):
        precision("bf16", health=limits)
    with pytest.raises(UserError, match="max_underflow_rate=2"):
        precision("fp8_deepseek", health=limits | {"max_underflow_rate": 2})
