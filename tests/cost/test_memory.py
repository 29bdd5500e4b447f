"""Memory by formula against the tensors that really exist: weights, gradients, states, and what autograd keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from taken_kernels import taken
from torch import Tensor

from moe_train.config import AdamWConfig, MuonConfig, OptimizerConfig, RunConfig
from moe_train.cost.fp8_operands import Fp8Kept
from moe_train.cost.head_tape import CHUNK_ELEMENTS
from moe_train.cost.kernels import MOST_IN_ONE_KERNEL, MOST_IN_PARTS, MOST_OF_A_MATRIX, Kernels, parts
from moe_train.cost.layer_tape import Circumstances
from moe_train.cost.layout import SINGLE
from moe_train.cost.memory import cache_elements_per_token, training_memory
from moe_train.cost.step_tape import StepTape
from moe_train.cost.tape import COPIES, Tape
from moe_train.kernels.cpu import experts, head, library, linear, muon
from moe_train.model import loss, transformer
from moe_train.model.attention import LayerCache
from moe_train.model.transformer import Transformer
from moe_train.precision import recipes, remade
from moe_train.precision.fp8 import holding_weights
from moe_train.training.optimizers import build_optimizers

SmallModel = Callable[..., Transformer]

ADAMW = AdamWConfig("adamw", 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0)
MUON = MuonConfig("muon", 1e-3, 0.95, True, 5, 0.1, 1.0, (0.9, 0.95), 1e-8)
NARROW = [replace(ADAMW, moments="bfloat16"), replace(MUON, moments="bfloat16", stochastic_rounding=True)]
ARMS = {
    "mla": [],
    "mla_q_compressed": ["attention.q_lora_rank=12"],
    "gqa": ["attention=gqa_4x32"],
    "heads_normed": ["attention=mha_4x32", "attention.qk_norm=per_head"],
    "vectors_normed": ["attention=gqa_4x32", "attention.qk_norm=all_heads"],
    "expert_choice": ["moe=expert_choice"],
    "capacity": ["moe=switch"],
    "batch_loss": ["moe=batch_loss"],
    "dense": ["dense_twin_of_moe=equal_flops"],
    "mtp": ["mtp=depth_2", "tie_word_embeddings=false"],
}
VOCAB, SEQUENCES, LENGTH = 64, 4, 64
TOKENS = SEQUENCES * LENGTH


def estimate(
    model: Transformer,
    *,
    optimizer: OptimizerConfig = ADAMW,
    compute_bytes: int = 4,
    activation_checkpointing: bool = False,
    kernels: Kernels = Kernels.TORCH,
    fp8: Fp8Kept | None = None,
) -> dict[str, int]:
    return training_memory(
        model.config,
        VOCAB,
        TOKENS,
        optimizer,
        compute_bytes=compute_bytes,
        activation_checkpointing=activation_checkpointing,
        kernels=kernels,
        fp8=fp8,
    )


def batch() -> tuple[Tensor, Tensor]:
    tokens, targets = torch.randint(0, VOCAB, (2, SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    return tokens, targets


def kept_bytes(model: Transformer, compute_bytes: int) -> int:
    """Bytes kept after a forward pass, by autograd or for it, weights and buffers left out, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    def pack_in_region(region: remade._Region, tensor: Tensor) -> object:
        packed = original(region, tensor)
        return pack(packed) if isinstance(packed, Tensor) else packed

    model.train()
    original = remade._Region.pack
    narrow = torch.autocast("cpu", torch.bfloat16, enabled=compute_bytes == 2)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with patch.object(remade._Region, "pack", pack_in_region), hooks, narrow:
        losses = model(*batch())
    assert losses.objective.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("arm", ["mla", "gqa", "dense", "mtp"])
@pytest.mark.parametrize("optimizer", [ADAMW, MUON, *NARROW], ids=lambda config: f"{config.kind}_{config.moments}")
def test_weights_gradients_and_states_are_exact(arm: str, optimizer: OptimizerConfig, small_model: SmallModel) -> None:
    model = small_model(*ARMS[arm], dtype=torch.float32)
    optimizers = build_optimizers(model, optimizer)
    model(*batch(), 0.3).objective.backward()
    for each in optimizers:
        each.step()

    def size(*tensors: Tensor) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    expected = estimate(model, optimizer=optimizer)
    assert expected["weights"] == size(*model.parameters(), *model.buffers())
    assert expected["gradients"] == size(*(p.grad for p in model.parameters() if p.grad is not None))
    # AdamW's step counters, one number a tensor, are the scalars left out.
    states = [value for each in optimizers for state in each.state.values() for value in state.values()]
    assert expected["optimizer_states"] == size(*(state for state in states if state.ndim))


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(
    ("kernels", "compute_bytes"),
    [(Kernels.TORCH, 2), (Kernels.TORCH, 4), (Kernels.COMPILED, 2), (Kernels.TRITON, 2)],
)
def test_what_autograd_keeps_is_estimated_within_six_percent(
    arm: str, kernels: Kernels, compute_bytes: int, small_model: SmallModel
) -> None:
    model = small_model(*ARMS[arm], dtype=torch.float32)
    expected = estimate(model, compute_bytes=compute_bytes, kernels=kernels)
    kept = expected["activations"] + expected["weight_copies"] + expected["head_gradients"]
    with taken(kernels, in_bf16=compute_bytes == 2):
        assert kept == pytest.approx(kept_bytes(model, compute_bytes), rel=0.06)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(("kernels", "compute_bytes"), [(Kernels.TORCH, 2), (Kernels.TORCH, 4), (Kernels.COMPILED, 2)])
def test_what_autograd_keeps_with_an_fp8_recipe_is_estimated_within_fifteen_percent(
    arm: str, kernels: Kernels, compute_bytes: int, small_model: SmallModel, compose_run: Callable[..., RunConfig]
) -> None:
    """Inputs of linear layers in FP8; the weights' FP8 forms are no tensors that autograd keeps."""
    model = small_model(*ARMS[arm], dtype=torch.float32)
    precision = compose_run("precision=fp8_deepseek").precision
    recipes.apply(model, precision, torch.device("cpu"))
    expected = estimate(model, compute_bytes=compute_bytes, kernels=kernels, fp8=Fp8Kept.by(precision.fp8))
    kept = expected["activations"] + expected["head_gradients"]
    with taken(kernels, in_bf16=compute_bytes == 2):
        assert kept == pytest.approx(kept_bytes(model, compute_bytes), rel=0.15)
    assert expected["activations"] < estimate(model, compute_bytes=compute_bytes, kernels=kernels)["activations"]


@pytest.mark.parametrize("name", ["fp8_deepseek", "fp8_rowwise"])
@pytest.mark.parametrize("compute_bytes", [2, 4], ids=["bfloat16", "float32"])
def test_in_what_a_swiglu_keeps_its_input_is_the_recipes(
    name: str, compute_bytes: int, small_model: SmallModel, compose_run: Callable[..., RunConfig]
) -> None:
    """Where it is most of what is kept: hidden states of 32, experts and layers ten times as wide."""
    wide = ("intermediate_size=320", "moe.moe_intermediate_size=320")
    model = small_model(*ARMS["gqa"], *wide, dtype=torch.float32)
    precision = compose_run(f"precision={name}").precision
    recipes.apply(model, precision, torch.device("cpu"))
    expected = estimate(model, compute_bytes=compute_bytes, fp8=Fp8Kept.by(precision.fp8))
    kept = expected["activations"] + expected["head_gradients"]
    assert kept == pytest.approx(kept_bytes(model, compute_bytes), rel=0.05)


def test_fp8_forms_of_weights_are_made_for_both_products_at_once(
    small_model: SmallModel, compose_run: Callable[..., RunConfig]
) -> None:
    model = small_model("attention=gqa_4x32", dtype=torch.float32)
    recipes.apply(model, compose_run("precision=fp8_deepseek").precision, torch.device("cpu"))
    with holding_weights():
        model(*batch())
        forms = [form for layer in recipes.fp8_layers(model).values() for form in layer._weights if form is not None]
        held = sum(form.values.nbytes + form.scales.nbytes for form in forms)
    tape = Tape()
    given = Circumstances(4, False, Kernels.TORCH, SINGLE, Fp8Kept())
    StepTape(tape, model.config, VOCAB, SEQUENCES, LENGTH, given, False).forward()
    assert tape.held()[COPIES] == held


def test_fp8_forms_of_weights_take_a_byte_a_value_and_a_scale_for_128_twice(small_model: SmallModel) -> None:
    model = small_model("moe=null", "attention=gqa_4x32", dtype=torch.float32)
    expected = 0
    for name, weight in model.named_parameters():
        if name.startswith("blocks.") and weight.ndim == 2:
            rows, columns = weight.shape
            expected += 2 * weight.numel() + 4 * (rows * -(-columns // 128) + columns * -(-rows // 128))
    for checkpointing in (False, True):
        copies = estimate(model, compute_bytes=2, activation_checkpointing=checkpointing, fp8=Fp8Kept())[
            "weight_copies"
        ]
        assert copies == expected


@pytest.mark.parametrize("arm", ARMS)
def test_with_checkpointing_the_inputs_of_layers_and_one_layer_are_kept(arm: str, small_model: SmallModel) -> None:
    # The largest layer is an MTP module where there are any.
    one_more = "mtp.depth=3" if arm == "mtp" else "num_hidden_layers=4"
    model, deeper = (small_model(*ARMS[arm], *more, dtype=torch.float32) for more in ([], [one_more]))
    with patch.object(transformer, "remaking", lambda on: contextlib.nullcontext()):  # what is made again keeps all
        one_layer = kept_bytes(deeper, 4) - kept_bytes(model, 4)
    model.activation_checkpointing = True
    expected = estimate(model, activation_checkpointing=True)
    kept = expected["activations"] + expected["head_gradients"]
    assert kept == pytest.approx(kept_bytes(model, 4) + one_layer, rel=0.15)


def test_casts_of_weights_exist_in_bfloat16_only(small_model: SmallModel) -> None:
    model = small_model(dtype=torch.float32)
    assert estimate(model, compute_bytes=4)["weight_copies"] == 0
    whole = estimate(model, compute_bytes=2)["weight_copies"]
    checkpointed = estimate(model, compute_bytes=2, activation_checkpointing=True)["weight_copies"]
    assert 0 < checkpointed < whole < 2 * sum(p.numel() for p in model.parameters())


def test_the_chunk_of_logits_is_the_losss_own() -> None:
    assert CHUNK_ELEMENTS[Kernels.TORCH] == loss.CHUNK_ELEMENTS["cpu"]
    assert CHUNK_ELEMENTS[Kernels.TRITON] == loss.CHUNK_ELEMENTS["cuda"]
    assert CHUNK_ELEMENTS[Kernels.COMPILED] == head._CHUNK_ELEMENTS


def test_what_kernels_in_c_do_in_parts_is_what_they_say() -> None:
    assert MOST_IN_PARTS == linear._MOST_WEIGHTS
    assert MOST_IN_ONE_KERNEL == experts._MOST_WEIGHTS
    assert MOST_OF_A_MATRIX == muon._LARGEST
    assert all(parts(rows) == library.parts(rows) for rows in (1, 10**4, 10**5))


@pytest.mark.parametrize("arm", ["mla", "gqa", "heads_normed"])
def test_the_cache_holds_as_many_elements_a_token_as_the_formula_says(arm: str, small_model: SmallModel) -> None:
    model = small_model(*ARMS[arm], dtype=torch.float32)
    caches = [LayerCache() for _ in model.blocks]
    with torch.no_grad():
        model.logits(batch()[0][:1], caches)
    assert sum(cache.bytes for cache in caches) == 4 * LENGTH * cache_elements_per_token(model.config)
