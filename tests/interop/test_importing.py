"""What comes in from a transformers folder, and what is turned away in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import load_theirs
from torch import nn

from moe_train.compose import validated
from moe_train.config import ModelConfig, YarnConfig
from moe_train.cost.flops import parameter_counts
from moe_train.errors import UserError
from moe_train.generation import load_trained
from moe_train.interop.export import export_run
from moe_train.interop.importing import import_model, read_config

Theirs = Callable[..., tuple[Path, nn.Module]]


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        import_model(folder, folder.parent / "ours")
    assert "\n" not in str(error.value)
    assert not (folder.parent / "ours").exists()


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias=True has no place here"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True has no place here"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu has no place here"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type=linear"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "the weights are quantised"),
        ("llama", {"architectures": ["GPT2LMHeadModel"]}, r"\(GPT2LMHeadModel\) is not known here: choose one of Deep"),
        ("llama", {"num_attention_heads": "many"}, "is not one that transformers accepts"),
        ("llama", {"vocab_size": 200}, "the tokenizer has 257 tokens and the model 200"),
        ("llama", {"hidden_size": 64}, r"weight is \(300, 32\) and config.json makes it \(300, 64\)"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window=True has no place here"),
        ("mixtral", {"sliding_window": 8}, "sliding_window=8 has no place here"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 has no place here"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 has no place here"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] has no place here: only the first"),
        ("glm4_moe", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "turns part of each head"),
        ("v3_groups", {"scoring_func": "softmax"}, "scoring_func=softmax has no place here"),
        ("v3_groups", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05 has no place here"),
        ("v2", {"norm_topk_prob": True}, "norm_topk_prob=True has no place here"),
        ("v3_groups", {"topk_group": 0}, "moe.topk_group=0"),
        ("v3_groups", {"n_group": 0}, "moe.n_group=0"),
    ],
)
def test_a_configuration_without_a_place_here_is_refused_by_name(
    case: str, changes: dict[str, Any], message: str, theirs: Theirs
) -> None:
    folder, _ = theirs(case)
    change_config(folder, **changes)
    refused(folder, message)


def test_tensors_that_are_missing_or_left_over_are_named(theirs: Theirs) -> None:
    folder, _ = theirs("qwen3_moe")
    lost = "model.layers.1.mlp.experts.3.up_proj.weight"
    kept = {}
    change_weights(folder, lambda weights: kept.update({lost: weights.pop(lost)}))
    refused(folder, rf"the tensor {re.escape(lost)} is missing")
    change_weights(folder, lambda weights: weights.update(kept) or weights.update(extra=torch.ones(1)))
    refused(folder, "the tensor extra has no place here")


def test_weights_in_another_form_or_damaged_are_refused(theirs: Theirs) -> None:
    folder, _ = theirs("llama")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    refused(folder, r"model.safetensors is damaged \(.*\): fetch it again")
    file.write_bytes(content)
    change_weights(folder, lambda w: w.update({"lm_head.weight": w["lm_head.weight"].to(torch.int8)}))
    refused(folder, "lm_head.weight is I8, and only F32, F16 and BF16 are read")
    file.rename(folder / "pytorch_model.bin")
    refused(folder, "has pytorch_model.bin and no safetensors")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "has no model.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}')
    refused(folder, "index.json names ../b.safetensors, which is not in the folder")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json cannot be read")
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")
    with pytest.raises(UserError, match="there is no such folder"):
        import_model(folder / "nowhere", folder.parent / "ours")


def test_a_layer_more_than_the_configuration_says_is_no_mtp_module(theirs: Theirs) -> None:
    folder, _ = theirs("llama")
    change_config(folder, num_hidden_layers=2)
    refused(folder, r"the tensor model\.layers\.2\..* has no place here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_position_embeddings": 0}, "max_position_embeddings=0 is no length"),
        ({"architectures": 5}, r"architecture \(5\) is not known"),
        ({"architectures": "LlamaModel"}, r"architecture \(LlamaModel\) is not known"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "abc"}}, "wrong kind|not one that transformers"),
    ],
    ids=str,
)
def test_values_of_a_wrong_kind_are_one_line(changes: dict[str, Any], message: str, theirs: Theirs) -> None:
    folder, _ = theirs("llama")
    change_config(folder, **changes)
    refused(folder, message)


def test_weights_that_are_not_finite_and_tokenizers_that_are_damaged_are_refused(theirs: Theirs) -> None:
    folder, _ = theirs("llama")
    (folder / "tokenizer.json").write_text('{"x": 1}')
    refused(folder, "^tokenizer=.*: cannot load it.*give tokenizer=FOLDER or tokenizer=bytes")
    (folder / "tokenizer.json").unlink()
    change_weights(folder, lambda w: w["model.norm.weight"].fill_(float("nan")))
    refused(folder, "model.norm.weight has values that are not finite")


def test_mtp_layers_of_a_dense_model_are_left_out_and_said_so(theirs: Theirs, tmp_path: Path) -> None:
    folder, _ = theirs("v3_dense")
    change_weights(folder, lambda weights: weights.update({"model.layers.3.eh_proj.weight": torch.ones(2, 2)}))
    (note,) = import_model(folder, tmp_path / "ours").notes
    assert note.startswith("left out: MTP module model.layers.3 ")


def test_dropout_of_attention_is_left_out_and_said_so(theirs: Theirs, tmp_path: Path) -> None:
    folder, _ = theirs("llama")
    change_config(folder, attention_dropout=0.1)
    assert import_model(folder, tmp_path / "ours").notes == [
        "left out: attention_dropout=0.1, which training here does not have"
    ]


def test_a_tied_head_that_is_written_too_must_be_the_embedding(theirs: Theirs, tmp_path: Path) -> None:
    folder, _ = theirs("llama_tied_mha")
    change_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))
    refused(folder, "lm_head.weight differs from them")
    change_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    import_model(folder, tmp_path / "ours")


def test_shards_in_several_files_are_read_as_one(theirs: Theirs, tokens: torch.Tensor, tmp_path: Path) -> None:
    folder, reference = theirs("mixtral", save={"max_shard_size": "20KB"})
    assert len(list(folder.glob("*.safetensors"))) > 3
    import_model(folder, tmp_path / "ours")
    with torch.no_grad():
        expected = reference(tokens).logits
        ours = load_trained(tmp_path / "ours").model.logits(tokens)
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_keys_of_published_configurations_are_understood(tmp_path: Path) -> None:
    # In the older form that DeepSeek's own files have: theta beside the scaling, "type", keys of other codebases.
    published = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
        "aux_loss_alpha": 0.001,
        "first_k_dense_replace": 1,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 1408,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "topk_group": 1,
        "topk_method": "greedy",
        "v_head_dim": 128,
        "vocab_size": 102400,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    family, theirs = read_config(tmp_path)
    model = validated(ModelConfig, family.to_settings(theirs, "lite", "there"), "settings")
    assert model.rope_scaling == YarnConfig("yarn", 40.0, 4096, 32.0, 1.0, 0.707)
    assert model.rope_theta == 10000
    assert model.moe is not None
    assert (model.moe.num_experts, model.moe.top_k, model.moe.num_shared_experts) == (64, 6, 2)
    assert model.moe.norm_topk_prob is False
    assert parameter_counts(model, 102400).total == pytest.approx(15.7e9, rel=1e-3)  # arXiv 2405.04434, appendix B


def test_a_folder_without_a_tokenizer_comes_in_and_goes_out_but_makes_no_text(theirs: Theirs, tmp_path: Path) -> None:
    folder, model = theirs("llama")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    imported = import_model(folder, tmp_path / "run")
    assert "no tokenizer.json" in imported.notes[-1]
    with pytest.raises(UserError, match=r"there is no tokenizer in .*tokenizer="):
        load_trained(tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "hf")
    again, wrong_keys = load_theirs(tmp_path / "hf")
    assert not wrong_keys
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())

    import_model(folder, tmp_path / "bytes", name="bytes", tokenizer="bytes")
    assert load_trained(tmp_path / "bytes").tokenizer.decode([65, 66]) == "AB"
