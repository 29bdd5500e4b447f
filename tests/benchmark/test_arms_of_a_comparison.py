"""Arms are comparable: the twin has equal FLOPs, transformers the same loss, 256 experts as many active parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch

from moe_train.benchmark import experts, peer, tax
from moe_train.benchmark.arms import TrainingArm
from moe_train.benchmark.bench import Bench, described, with_usual
from moe_train.benchmark.peer_arm import PeerArm
from moe_train.benchmark.step_memory import peak_bytes
from moe_train.compose import compose_run
from moe_train.cost.flops import training_flops_per_token
from moe_train.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("model", ["nano", "tiny", "small", "base"])
def test_the_dense_twin_has_the_same_flops_depth_and_attention(model: str) -> None:
    config = compose_run([f"model={model}"], "test")
    twin, ratio = tax.dense_twin(config)
    assert twin.model.moe is None
    assert twin.model.attention == config.model.attention
    assert twin.model.num_hidden_layers == config.model.num_hidden_layers
    flops = [training_flops_per_token(each.model, 256, config.vocab_size) for each in (twin, config)]
    assert flops[0] / flops[1] == pytest.approx(ratio)
    assert ratio == pytest.approx(1, abs=0.01)


def test_a_twin_that_cannot_be_equal_and_a_model_without_experts_are_refused() -> None:
    narrow = ["model=nano", "model.moe.moe_intermediate_size=1", "model.moe.first_k_dense_replace=0"]
    narrow += ["data.vocab_size=320", "data.sequence_length=16"]
    with pytest.raises(UserError, match=r"times its FLOPs a token.*choose a larger model"):
        tax.dense_twin(compose_run(narrow, "test"))
    for model in ("dense_nano", "llama_3_1_8b"):
        with pytest.raises(UserError, match="has no experts"):
            tax.dense_twin(compose_run([f"model={model}"], "test"))
        with pytest.raises(UserError, match="has no experts"):
            experts.with_experts(compose_run([f"model={model}"], "test"), 8)


def test_8_and_256_experts_have_the_same_active_parameters_but_for_the_router() -> None:
    config = compose_run(["model=tiny"], "test")
    few, many = (experts.with_experts(config, count) for count in (experts.FEW, experts.MANY))
    assert experts.active_without_routers(few) == experts.active_without_routers(many)
    with pytest.raises(UserError, match=r"with 8 experts: top_k=9 is more than num_experts=8"):
        experts.with_experts(compose_run(["model=tiny", "model.moe.top_k=9"], "test"), 8)


@pytest.mark.parametrize("more", [(), ("micro_batch_size=2",), ("model.moe=null",)])
def test_transformers_computes_the_loss_and_gradients_of_our_weights(
    more: tuple[str, ...], bench: Callable[..., Bench], tmp_path: Path
) -> None:
    config = bench(*more).config("model=nano", "optimizer=adamw")
    ours = TrainingArm(config, bench().runtime)
    theirs = PeerArm(ours, tmp_path)
    loss, gradient = peer.relative_difference(ours, theirs)
    assert loss < peer.LOSS_TOLERANCE
    assert gradient < peer.GRADIENT_TOLERANCE

    before = [parameter.detach().clone() for parameter in theirs.model.parameters()]
    theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(before, theirs.model.parameters(), strict=True))

    with torch.no_grad():  # other weights are found out
        theirs.model.get_input_embeddings().weight.mul_(1.5)
    loss, gradient = peer.relative_difference(ours, theirs)
    assert loss > peer.LOSS_TOLERANCE
    assert gradient > peer.GRADIENT_TOLERANCE


def test_arms_that_compute_different_things_are_not_timed(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "relative_difference", lambda ours, theirs: (0.1, 0.0))
    figures = {figure.name: figure for figure in peer.run(bench())}
    assert figures["peer_speedup"].value is None
    assert "do not compute the same" in str(figures["peer_speedup"].note)


def test_a_step_of_an_arm_changes_no_weight_and_counts_its_tokens(bench: Callable[..., Bench]) -> None:
    arm = TrainingArm(bench("micro_batch_size=2").config("model=nano"), bench().runtime)
    before = {name: tensor.detach().clone() for name, tensor in arm.model.named_parameters()}
    arm.step()
    arm.forward_backward()
    for name, tensor in arm.model.named_parameters():
        assert torch.equal(tensor, before[name]), name
        assert tensor.grad is None
    assert arm.tokens == 4 * 16
    per_token = training_flops_per_token(arm.model_config, 16, arm.vocab_size)
    assert arm.flops_per_step == pytest.approx(64 * per_token)


def test_the_peak_of_a_step_holds_the_state_and_what_the_step_makes() -> None:
    state = torch.zeros(1024)
    peak = peak_bytes(lambda: state + 1, [state], CPU)
    assert peak == 2 * state.nbytes


def test_what_is_trained_is_said_by_the_tokens_of_a_whole_step(bench: Callable[..., Bench]) -> None:
    def said(*given: str) -> str:
        made = bench(*given)
        return described(made.config("model=nano"), made.runtime)

    assert said() == said("micro_batch_size=4") == "nano, 4 × 16 tokens, FP32, muon"
    assert said("micro_batch_size=2") == "nano, 4 × 16 tokens in micro-batches of 2, FP32, muon"


def test_given_settings_win_over_usual_ones_and_another_model_brings_its_own() -> None:
    usual = ("model=base", "model.moe.num_experts=64", "batch_size=4")
    assert with_usual(usual, ["batch_size=8"]) == ["model=base", "model.moe.num_experts=64", "batch_size=8"]
    assert with_usual(usual, ["model=nano"]) == ["batch_size=4", "model=nano"]
    assert with_usual(usual, ["model.moe.num_experts=8"])[-1] == "model.moe.num_experts=8"


def test_settings_of_a_suite_can_be_kept_from_the_user(bench: Callable[..., Bench]) -> None:
    given = dataclasses.replace(bench(), given=("optimizer=muon", "model=nano"))
    assert given.config("optimizer=adamw").optimizer.kind == "muon"
    assert given.config("optimizer=adamw", without=["optimizer"]).optimizer.kind == "adamw"


def test_a_model_that_cannot_be_compiled_is_compared_as_it_is(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(self: PeerArm) -> None:
        raise RuntimeError("no working\ncompiler")

    monkeypatch.setattr(PeerArm, "compiled_step", no_compiler)
    figures = {figure.name: figure for figure in peer.run(bench(), "model=nano")}
    compiled = figures["peer_tokens_per_second_compiled"]
    assert (compiled.value, compiled.note) == (None, "torch.compile fails here: RuntimeError: no working compiler")
    assert "against eager" in str(figures["peer_speedup"].note)
    assert figures["peak_memory_ratio"].value is not None


def test_theirs_is_taken_with_weights_in_both_formats_and_compared_in_the_faster(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_bf16 = bench()
    in_bf16 = dataclasses.replace(
        in_bf16, runtime=dataclasses.replace(in_bf16.runtime, dtype=torch.bfloat16), compiles_peer=False
    )
    stepped: list[set[torch.dtype]] = []
    step = PeerArm.step

    def seen(self: PeerArm) -> None:
        stepped.append({parameter.dtype for parameter in self.model.parameters()})
        step(self)

    monkeypatch.setattr(PeerArm, "step", seen)
    figures = {figure.name: figure for figure in peer.run(in_bf16, "model=nano")}
    assert stepped[0] == {torch.float32}
    assert torch.bfloat16 in stepped[-1]  # a router may stay in FP32
    wide, narrow = (figures[f"peer_tokens_per_second{suffix}"] for suffix in ("", "_bf16_weights"))
    assert wide.value is not None
    assert narrow.value is not None
    faster = "against eager with weights in BF16" if narrow.value > wide.value else "against eager"
    assert str(figures["peer_speedup"].note).endswith(faster)
    assert figures["peak_memory_ratio_bf16_weights"].value is not None


def test_on_a_gpu_theirs_is_compiled_with_weights_in_bf16_alone(bench: Callable[..., Bench]) -> None:
    """With weights in FP32 it breaks off in every layer, after minutes."""
    compiled: list[bool] = []

    class Arm:
        def __init__(self, autocasts: bool) -> None:
            self.autocasts = autocasts

        def compiled_step(self) -> None:
            compiled.append(self.autocasts)

    on_gpu = dataclasses.replace(bench(), compiles_peer=True)
    on_gpu = dataclasses.replace(on_gpu, runtime=dataclasses.replace(on_gpu.runtime, device_type="cuda"))
    said = [peer._try_to_compile(on_gpu, cast(PeerArm, Arm(autocasts))) for autocasts in (True, False)]
    assert "not tried: with weights in FP32" in str(said[0])
    assert isinstance(said[1], float)
    assert compiled == [False]
