"""MTP modules on disk as DeepSeek-V3 published its own, and against transformers' own MTP layers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import gradients_on_disk, largest_difference, load_theirs
from torch import nn
from transformers.modeling_layers import MtpModel

from moe_train.errors import UserError
from moe_train.generation import PlainDecoder, load_trained
from moe_train.interop.export import export_run
from moe_train.interop.families import family_named
from moe_train.interop.importing import import_model
from moe_train.interop.names import places
from moe_train.training.run_folder import load_run_config

AsRun = Callable[..., Path]

# A family, the depth, and settings.
MODELS = {
    "deepseek_v3": ("deepseek_v3", 1, ("mtp=depth_1", "tie_word_embeddings=false", "moe=group_limited")),
    "deepseek_v3_two_tied": ("deepseek_v3", 2, ("mtp=depth_2", "moe.num_shared_experts=0", "attention.q_lora_rank=8")),
    "glm4_moe": ("glm4_moe", 1, ("mtp=depth_1", "attention=gqa_4x32", "attention.head_dim=8")),
}
LAYERS = 3  # of the main model


@pytest.fixture
def depth_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers looks for MTP modules at the depths of published models; here it is told of ours."""
    for architecture in (transformers.DeepseekV3ForCausalLM, transformers.Glm4MoeForCausalLM):
        monkeypatch.setattr(architecture, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[34]\..*"])


@pytest.mark.parametrize("model", MODELS)
def test_modules_go_out_as_published_and_come_back_bit_for_bit(model: str, as_run: AsRun, tmp_path: Path) -> None:
    family, depth, settings = MODELS[model]
    run = as_run(*settings)
    exported = export_run(run, tmp_path / "hf", mtp="keep", max_shard_bytes=40_000)
    assert exported.family == family
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["num_hidden_layers"] == LAYERS
    assert config["num_nextn_predict_layers"] == depth
    imported = import_model(tmp_path / "hf", tmp_path / "again")
    assert imported.num_params == exported.num_params
    assert f"with {depth} MTP module(s)" in imported.notes[0]
    ours, again = load_trained(run).model.state_dict(), load_trained(tmp_path / "again").model.state_dict()
    assert [name for name in again if name.startswith(f"mtp.{depth - 1}.")]
    assert again.keys() == ours.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in ours.items())
    export_run(tmp_path / "again", tmp_path / "hf2", mtp="keep", max_shard_bytes=40_000)
    for file in (tmp_path / "hf").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "hf2" / file.name).read_bytes()


def test_what_transformers_itself_makes_of_the_modules_is_said(as_run: AsRun, tmp_path: Path) -> None:
    run = as_run("mtp=depth_1")
    with pytest.raises(UserError, match=r"mtp\.depth=1 has no place.*mtp=drop writes the main model.*mtp=keep"):
        export_run(run, tmp_path / "hf")
    export_run(run, tmp_path / "hf", mtp="keep")
    _, wrong_keys = load_theirs(tmp_path / "hf")
    assert set(wrong_keys) == {"unexpected_keys"}
    assert all(key.startswith(f"model.layers.{LAYERS}.") for key in wrong_keys["unexpected_keys"])
    card = (tmp_path / "hf/README.md").read_text()
    assert "calls their tensors unexpected" in card
    assert "leaves out" not in card


@pytest.mark.usefixtures("depth_known")
@pytest.mark.parametrize("model", MODELS)
def test_a_module_computes_what_transformers_own_does_in_value_and_gradient(
    model: str, as_run: AsRun, tokens: torch.Tensor, tmp_path: Path
) -> None:
    family, depth, settings = MODELS[model]
    run = as_run(*settings)
    export_run(run, tmp_path / "hf", mtp="keep")
    ours = load_trained(run).model
    theirs, wrong_keys = load_theirs(tmp_path / "hf")
    assert not wrong_keys
    modules = MtpModel.from_pretrained(theirs)
    modules.train(False)
    targets = tokens.roll(-1, 1)

    expected = ours(tokens, targets, mtp_weight=depth)  # λ weighs the mean of the modules
    expected.objective.backward()
    main = theirs.model(tokens).last_hidden_state
    losses = [F.cross_entropy(theirs.lm_head(main).flatten(0, 1), targets.flatten(), reduction="sum")]
    hidden = main
    for k in range(depth):
        positions = torch.arange(tokens.shape[1] - k - 1).unsqueeze(0)
        hidden = modules.forward_layer(k, hidden[:, :-1], positions, None, input_ids=tokens[:, k + 1 :])
        logits = modules.shared_head(hidden)
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets[:, k + 1 :].flatten(), reduction="sum"))
    torch.testing.assert_close(torch.stack(losses[1:]), expected.mtp_nll_k, rtol=1e-5, atol=0)
    torch.stack(losses).sum().backward()

    names = family_named(family).names
    found = gradients_on_disk(theirs, names) | as_published(gradients_on_disk(modules, names))
    # FP32: sums over 80 tokens and fewer, rounded in another order. The largest seen of any tensor was 2e-6.
    assert largest_difference(ours, places(ours.config, names), found) < 1e-5


def as_published(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names of MTP modules in memory as those on disk."""
    found = {}
    for name, gradient in gradients.items():
        if layer := re.match(r"layers\.(\d+)\.", name):
            rest = name.removeprefix(layer[0]).removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.", 1)
            found[f"model.layers.{LAYERS + int(layer[1])}.{rest}"] = gradient
    return found


@pytest.mark.usefixtures("depth_known")
def test_transformers_drafts_with_an_exported_module_and_writes_the_text_of_ours(as_run: AsRun, tmp_path: Path) -> None:
    run = as_run("mtp=depth_1", "tie_word_embeddings=false")
    export_run(run, tmp_path / "hf", mtp="keep")
    ours, (theirs, _) = load_trained(run), load_theirs(tmp_path / "hf")
    prompt = ours.tokenizer.encode("to be ")
    text = list(PlainDecoder(ours.model).tokens(prompt, 20))
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    assert isinstance(theirs, nn.Module)
    drafted = theirs.generate(torch.tensor([prompt]), use_mtp=True, **options)
    assert drafted[0, len(prompt) :].tolist() == text


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("copy", ["embed_tokens", "shared_head.head"])
def test_a_module_with_an_embedding_or_head_of_its_own_is_left_out_and_said_so(
    copy: str, as_run: AsRun, tmp_path: Path
) -> None:
    export_run(as_run("mtp=depth_1"), tmp_path / "hf", mtp="keep")
    changed(tmp_path / "hf", lambda w: w[f"model.layers.3.{copy}.weight"].add_(1))
    imported = import_model(tmp_path / "hf", tmp_path / "again")
    assert imported.notes == [
        "left out: MTP module model.layers.3 (taken are those of mixtures that share embedding and head)"
    ]
    assert load_run_config(tmp_path / "again").model.mtp is None


def test_copies_that_are_not_written_are_not_missed_and_other_tensors_are(as_run: AsRun, tmp_path: Path) -> None:
    export_run(as_run("mtp=depth_1"), tmp_path / "hf", mtp="keep")
    layer = "model.layers.3"
    changed(
        tmp_path / "hf", lambda w: (w.pop(f"{layer}.embed_tokens.weight"), w.pop(f"{layer}.shared_head.head.weight"))
    )
    import_model(tmp_path / "hf", tmp_path / "again")
    assert load_run_config(tmp_path / "again").model.mtp_depth == 1
    changed(tmp_path / "hf", lambda w: w.pop(f"{layer}.hnorm.weight"))
    with pytest.raises(UserError, match=rf"the tensor {layer}\.hnorm\.weight is missing"):
        import_model(tmp_path / "hf", tmp_path / "other")


def test_a_dense_models_modules_have_no_place(as_run: AsRun, tmp_path: Path) -> None:
    run = as_run("mtp=depth_1", moe=None)
    with pytest.raises(UserError, match=r"model\.mtp with model\.moe=null \(its MTP modules have experts; mtp=drop"):
        export_run(run, tmp_path / "hf", mtp="keep", family="deepseek_v3")
