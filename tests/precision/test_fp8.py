"""Layers in FP8: each product against float64 of the rounded operands, and how much of the signal is left."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from recipes_by_name import precision, recipe
from torch import Tensor

from moe_train.compose import CONFIGS, validated
from moe_train.config import OperandConfig, PrecisionConfig, RunConfig
from moe_train.errors import UserError
from moe_train.model.experts import Experts
from moe_train.model.layers import Linear
from moe_train.model.transformer import Transformer
from moe_train.precision import recipes
from moe_train.precision.emulated import Emulated
from moe_train.precision.fp8 import Fp8Layer, holding_weights
from moe_train.precision.matmul import grouped_linear, linear
from moe_train.precision.quantize import quantize

CPU = torch.device("cpu")
RECIPES = sorted(path.stem for path in (CONFIGS / "precision").glob("fp8_*.yaml"))


def rounded(x: Tensor, operand: OperandConfig) -> Tensor:
    return quantize(x, operand).dequantized().double()


def signal_to_noise(found: Tensor, exact: Tensor) -> float:
    """Decibels."""
    return float(20 * torch.log10(exact.double().norm() / (found.double() - exact.double()).norm()))


SIZES = [0, 130, 1, 0, 257, 64]


def case(sizes: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, weights, gradient and ends of groups of `sizes`; activations with a few large channels, as in models."""
    generator = torch.Generator().manual_seed(0)
    rows, inner, outer = sum(sizes), 200, 136
    x = torch.randn(rows, inner, generator=generator) * (1 + 20 * (torch.rand(inner, generator=generator) > 0.97))
    weight = torch.randn(len(sizes), outer, inner, generator=generator) * 0.05
    grad = torch.randn(rows, outer, generator=generator) * 1e-3
    return x, weight, grad, torch.tensor(sizes).cumsum(0).int()


def through(layer: Fp8Layer, x: Tensor, weight: Tensor, grad: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = grouped_linear(x, weight, ends, layer)
    y.backward(grad)
    assert x.grad is not None
    assert weight.grad is not None
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("name", RECIPES)
def test_each_product_is_that_of_its_rounded_operands(name: str) -> None:
    own = recipe(name)
    x, weight, grad, ends = case(SIZES)
    y, grad_x, grad_weight = through(Fp8Layer(own, Emulated()), x, weight, grad, ends)
    start = 0
    for group, end in enumerate(ends.tolist()):
        rows, g, w = x[start:end], grad[start:end], weight[group]
        if end == start:
            assert not grad_weight[group].any()
            continue
        kept = quantize(rows, own.forward.activation).dequantized()
        expected = {
            "y": rounded(rows, own.forward.activation) @ rounded(w, own.forward.weight).T,
            "grad_x": rounded(g, own.input_gradient.gradient) @ rounded(w.T, own.input_gradient.weight).T,
            "grad_weight": rounded(g.T, own.weight_gradient.gradient)
            @ rounded(kept.T, own.weight_gradient.activation).T,
        }
        found = {"y": y[start:end], "grad_x": grad_x[start:end], "grad_weight": grad_weight[group]}
        for what, exact in expected.items():
            torch.testing.assert_close(found[what].double(), exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max()))
        start = end


def test_under_autocast_only_the_result_is_rounded_to_bf16() -> None:
    x, weight, _, ends = case(SIZES)
    x = x.bfloat16().float()
    layer = Fp8Layer(recipe("fp8_deepseek"), Emulated())
    exact = grouped_linear(x, weight, ends, layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(grouped_linear(x, weight, ends, layer), exact.bfloat16())


# Decibels of the result over its error, against unrounded operands; what the recipes leave of the signal here.
FLOORS = {
    "fp8_deepseek": (27.0, 26.0),
    "fp8_rowwise": (26.0, 24.0),
    "fp8_tensorwise": (24.0, 22.0),
    "fp8_e5m2_gradients": (27.0, 21.0),
    "fp8_block_gradients": (27.0, 25.0),
}


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_left_of_the_signal_is_above_its_floor(name: str) -> None:
    x, weight, grad, ends = case(SIZES)
    y, grad_x, grad_weight = through(Fp8Layer(recipe(name), Emulated()), x, weight, grad, ends)
    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    bounds = itertools.pairwise([0, *ends.tolist()])
    exact = torch.cat([exact_x[a:b] @ w.T for (a, b), w in zip(bounds, exact_weight, strict=True)])
    exact.backward(grad.double())
    assert exact_x.grad is not None
    assert exact_weight.grad is not None
    output, gradient = FLOORS[name]
    assert signal_to_noise(y, exact.detach()) >= output
    assert signal_to_noise(grad_x, exact_x.grad) >= gradient
    assert signal_to_noise(grad_weight, exact_weight.grad) >= gradient


def test_the_controls_lose_more_of_the_gradient_than_the_recipe_they_change() -> None:
    # Token by token gradients differ in size, as they do in training.
    x, weight, grad, ends = case([512])
    grad = grad * torch.logspace(-3, 0, 512)[:, None]
    exact = grad.double() @ weight[0].double()
    lost = {}
    for name in ("fp8_deepseek", "fp8_e5m2_gradients", "fp8_block_gradients"):
        _, grad_x, _ = through(Fp8Layer(recipe(name), Emulated()), x, weight, grad, ends)
        lost[name] = signal_to_noise(grad_x[:256], exact[:256])  # the tokens with the smaller gradients
    assert lost["fp8_deepseek"] > lost["fp8_e5m2_gradients"] + 3
    assert lost["fp8_deepseek"] > lost["fp8_block_gradients"]


def test_one_group_of_all_rows_is_a_linear_layer() -> None:
    x, weight, _, _ = case([64])
    layer = Fp8Layer(recipe("fp8_deepseek"), Emulated())
    grouped = grouped_linear(x, weight, torch.tensor([64], dtype=torch.int32), layer)
    assert torch.equal(linear(x.view(4, 16, -1), weight[0], layer).view(64, -1), grouped)


def test_without_rows_there_is_an_empty_result_and_a_gradient_of_zero() -> None:
    x, weight, grad, ends = case([0, 0])
    y, grad_x, grad_weight = through(Fp8Layer(recipe("fp8_deepseek"), Emulated()), x, weight, grad, ends)
    assert (y.shape, grad_x.shape) == ((0, 136), (0, 200))
    assert not grad_weight.any()


class Counting(Emulated):
    """Emulated, and counts how often a weight was rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded: list[tuple[bool, bool]] = []  # for the forward product, for the input gradient

    def round_weights(self, weight_eoi: Tensor, forward: OperandConfig | None, backward: OperandConfig | None):
        self.rounded.append((forward is not None, backward is not None))
        return super().round_weights(weight_eoi, forward, backward)


def test_weights_are_rounded_once_a_step_and_anew_outside_of_one() -> None:
    backend = Counting()
    layer = Fp8Layer(recipe("fp8_deepseek"), backend)
    weight = torch.nn.Parameter(torch.randn(136, 200))

    def micro_batches(count: int) -> list[tuple[bool, bool]]:
        backend.rounded.clear()
        for _ in range(count):
            linear(torch.randn(8, 200, requires_grad=True), weight, layer).sum().backward()
        return list(backend.rounded)

    for _ in range(2):  # steps
        with holding_weights():
            assert micro_batches(3) == [(True, True)]
    assert micro_batches(2) == [(True, False), (False, True)] * 2


def test_a_copied_layer_does_not_share_rounded_weights() -> None:
    layer = Fp8Layer(recipe("fp8_deepseek"), Emulated())
    copied = copy.deepcopy(layer)
    x, first, second = torch.randn(8, 200), torch.randn(136, 200), torch.randn(136, 200)
    with holding_weights():
        y = linear(x, first, layer)
        assert torch.equal(linear(x, first, layer), y)
        assert not torch.equal(linear(x, second, copied), y)


@pytest.mark.parametrize("name", ["fp8_deepseek", "fp8_rowwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_layer_has_no_graph_break_and_the_same_gradients(name: str, dtype: torch.dtype) -> None:
    x, weight, _, ends = case(SIZES)
    second = weight[0, :72, :136]
    layers = Fp8Layer(recipe(name), Emulated()), Fp8Layer(recipe(name), Emulated())

    def both(x: Tensor, w: Tensor, v: Tensor, ends: Tensor) -> Tensor:
        return linear(grouped_linear(x, w, ends, layers[0]).relu(), v, layers[1])

    found = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (x, weight, second)]
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            y = function(*leaves, ends)
        assert y.dtype == dtype
        y.backward(torch.ones_like(y))
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_of_the_optimizer_is_seen_by_the_next(fused: bool) -> None:
    # torch's fused AdamW changes weights without counting up their version.
    layer = Fp8Layer(recipe("fp8_deepseek"), Emulated())
    weight = torch.nn.Parameter(torch.randn(136, 200))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    x = torch.randn(8, 200)
    outputs = []
    for _ in range(2):
        with holding_weights():
            y = linear(x, weight, layer)
            outputs.append(y.detach())
            y.sum().backward()
        optimizer.step()
    exact = x @ weight.detach().T
    assert not torch.equal(*outputs)
    assert signal_to_noise(linear(x, weight, layer).detach(), exact) > 25


def test_what_is_kept_of_an_input_is_in_fp8() -> None:
    kept = []
    x, weight, _, ends = case(SIZES)
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grouped_linear(x, weight.requires_grad_(), ends, Fp8Layer(recipe("fp8_deepseek"), Emulated()))
    own = {weight.data_ptr()}
    sizes = {t.dtype: sum(k.nbytes for k in kept if k.dtype == t.dtype and k.data_ptr() not in own) for t in kept}
    assert sizes[torch.float8_e4m3fn] == x.numel()
    assert sizes[torch.float32] == 4 * len(x) * 2  # two scales a row of 200


@pytest.fixture
def model(small_model: Callable[..., Transformer]) -> Transformer:
    return small_model("mtp=depth_1", dtype=torch.float32)


@pytest.mark.parametrize("tf32", [False, True])
def test_the_table_says_what_the_router_multiplies_in(
    tf32: bool, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "router_in_tf32", lambda device, compute: tf32 and compute is torch.bfloat16)
    rows = {row["layer"]: row for row in recipes.table(model, torch.bfloat16, torch.device("cpu"))}
    assert rows["router"]["all"] == ("tensorfloat32" if tf32 else "float32")


def test_blocks_are_in_fp8_and_router_head_and_embedding_are_not(model: Transformer) -> None:
    recipes.apply(model, precision("fp8_deepseek"), CPU)
    in_fp8 = {name for name, m in model.named_modules() if isinstance(m, Linear | Experts) and m.fp8 is not None}
    assert in_fp8 == {
        name
        for name, m in model.named_modules()
        if isinstance(m, Linear | Experts) and name.startswith(("blocks.", "mtp."))
    }
    assert any(name.startswith("mtp.") for name in in_fp8)
    rows = {row["layer"]: row for row in recipes.table(model, torch.bfloat16, torch.device("cpu"))}
    assert rows["attention.o_proj"]["forward"] == "e4m3 a tile, 2ⁿ · e4m3 a block"
    assert rows["ffn.experts.down_proj"]["weight_gradient"] == "e4m3 a tile, 2ⁿ · e4m3 a tile"
    assert (rows["head"]["all"], rows["router"]["all"]) == ("bfloat16", "float32")


TILES, POWERS = "e4m3 a tile", "e4m3 a tile, 2ⁿ"


def test_scales_are_powers_of_two_where_deepseeks_report_has_them(model: Transformer) -> None:
    """The input of the projection after attention, and what goes between devices: to routed experts and back."""
    recipes.apply(model, precision("fp8_deepseek"), CPU)
    rows = {row["layer"]: row for row in recipes.table(model, torch.bfloat16, torch.device("cpu"))}
    found = {
        name: (row["forward"].split(" · ")[0], *row["weight_gradient"].split(" · "))
        for name, row in rows.items()
        if "forward" in row
    }
    expected = dict.fromkeys(found, (TILES, TILES, TILES))
    for name in ("attention.o_proj", "ffn.experts.gate_up_proj"):
        expected |= {name: (POWERS, TILES, POWERS)}
    expected |= {"ffn.experts.down_proj": (TILES, POWERS, TILES)}
    of_mtp = {f"block.{name}": row for name, row in expected.items() if f"block.{name}" in found}
    assert found == expected | of_mtp
    for name, row in rows.items():
        if "forward" in row:
            assert (POWERS in row["input_gradient"]) == name.endswith(".experts.down_proj")


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj", "q_proj"])
@pytest.mark.parametrize("key", ["inputs", "gradients"])
def test_scales_of_any_layer_can_be_powers_of_two(model: Transformer, key: str, part: str) -> None:
    """It is what the layer rounds with: products and gradients are those of such operands throughout."""
    content = yaml.safe_load((CONFIGS / "precision/fp8_deepseek.yaml").read_text())
    content["fp8"] |= {"power_of_two_inputs_of": [], "power_of_two_gradients_of": []}
    content["fp8"][f"power_of_two_{key}_of"] = [part]
    recipes.apply(model, validated(PrecisionConfig, content, "recipe"), CPU)
    for name, layer in recipes.fp8_layers(model).items():
        own, at = layer.recipe, name.endswith(f".{part}")
        inputs, gradients = at and key == "inputs", at and key == "gradients"
        assert own.forward.activation.power_of_two == own.weight_gradient.activation.power_of_two == inputs
        assert own.input_gradient.gradient.power_of_two == own.weight_gradient.gradient.power_of_two == gradients
        assert not own.forward.weight.power_of_two


def test_a_recipe_for_experts_is_one_for_dense_models_too(small_model: Callable[..., Transformer]) -> None:
    dense = small_model("moe=null", dtype=torch.float32)
    recipes.apply(dense, precision("fp8_deepseek"), CPU)
    assert not any(layer.recipe.input_gradient.gradient.power_of_two for layer in recipes.fp8_layers(dense).values())


def test_evaluation_is_in_fp8_only_where_asked_for(model: Transformer) -> None:
    tokens = torch.arange(64).view(2, 32) % 64
    model.eval()
    with torch.no_grad():
        plain = model.logits(tokens)
        recipes.apply(model, precision("fp8_deepseek"), CPU)
        assert torch.equal(model.logits(tokens), plain)
        recipes.apply(model, precision("fp8_deepseek", evaluate_in_fp8=True), CPU)
        assert not torch.equal(model.logits(tokens), plain)


def test_recomputed_activations_give_the_same_gradients(small_model: Callable[..., Transformer]) -> None:
    tokens, targets = torch.randint(0, 64, (2, 2, 32), generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        model = small_model(dtype=torch.float32)
        model.activation_checkpointing = checkpointing
        recipes.apply(model, precision("fp8_deepseek"), CPU)
        model.train()
        model(tokens, targets).objective.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_layer_that_does_not_exist_is_named(model: Transformer) -> None:
    content = yaml.safe_load((CONFIGS / "precision/fp8_deepseek.yaml").read_text())
    content["fp8"]["power_of_two_inputs_of"] = ["o_project"]
    with pytest.raises(UserError, match=r"names o_project, and the model has .*o_proj"):
        recipes.apply(model, validated(PrecisionConfig, content, "recipe"), CPU)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_run(name: str, compose_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = compose_run(f"precision={name}")
    assert config.precision.name == name
    assert config.precision.fp8 is not None
