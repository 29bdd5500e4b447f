"""transformers → ours → transformers: the same logits, the same text, the same bits, for every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import CASES, load_theirs
from tokenizers import Tokenizer, processors
from torch import nn
from transformers import AutoTokenizer

from moe_train.generation import PlainDecoder, generate, load_trained
from moe_train.interop.export import export_run
from moe_train.interop.importing import import_model

Theirs = Callable[..., tuple[Path, nn.Module]]


def assert_same_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within 1e-5 of the largest: FP32 rounding of sums in another order, through three layers."""
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_a_model_comes_in_with_its_logits_and_goes_out_with_its_bits(
    case: str, theirs: Theirs, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder, reference = theirs(case)
    import_model(folder, tmp_path / "ours")
    ours = load_trained(tmp_path / "ours")
    with torch.no_grad():
        expected = reference(tokens).logits
        assert_same_logits(ours.model.logits(tokens), expected)

    prompt = ours.tokenizer.encode("to be ")
    text = list(PlainDecoder(ours.model).tokens(prompt, 20))
    generated = reference.generate(
        torch.tensor([prompt]), max_new_tokens=20, min_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert text == generated[0, len(prompt) :].tolist()

    export_run(tmp_path / "ours", tmp_path / "back")
    back, wrong_keys = load_theirs(tmp_path / "back")
    assert not wrong_keys
    assert type(back) is type(reference)
    state = back.state_dict()
    assert state.keys() == reference.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in reference.state_dict().items())
    with torch.no_grad():
        assert torch.equal(back(tokens).logits, expected)


def test_rotary_features_in_halves_on_disk_are_read_as_such(
    theirs: Theirs, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder, reference = theirs("v3_groups", rope_interleave=False)
    import_model(folder, tmp_path / "ours")
    with torch.no_grad():
        assert_same_logits(load_trained(tmp_path / "ours").model.logits(tokens), reference(tokens).logits)


def test_bf16_weights_stay_bf16_on_disk_and_come_back_bit_for_bit(theirs: Theirs, tmp_path: Path) -> None:
    folder, reference = theirs("v3_groups", dtype=torch.bfloat16, save={"max_shard_size": "20KB"})
    assert (folder / "model.safetensors.index.json").exists()
    import_model(folder, tmp_path / "ours")
    exported = export_run(tmp_path / "ours", tmp_path / "back")
    assert exported.dtype == "bfloat16"
    back, wrong_keys = load_theirs(tmp_path / "back")
    assert not wrong_keys
    assert back.dtype == torch.bfloat16
    state = back.state_dict()
    assert all(torch.equal(tensor, state[name].to(tensor.dtype)) for name, tensor in reference.state_dict().items())


def test_the_tokenizer_comes_back_with_its_ids_and_its_end(theirs: Theirs, tmp_path: Path) -> None:
    folder, _ = theirs("llama")
    import_model(folder, tmp_path / "ours")
    export_run(tmp_path / "ours", tmp_path / "back")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer("naïve", add_special_tokens=False)["input_ids"] == list("naïve".encode())
    assert tokenizer.eos_token_id == 256
    generation = json.loads((tmp_path / "back/generation_config.json").read_text())
    assert generation["eos_token_id"] == 256


def test_gradients_are_those_of_transformers(theirs: Theirs, tokens: torch.Tensor, tmp_path: Path) -> None:
    folder, reference = theirs("v3_groups")
    import_model(folder, tmp_path / "ours")
    ours = load_trained(tmp_path / "ours").model.double()
    targets = tokens.roll(-1, 1)
    ours(tokens, targets).objective.backward()
    logits = reference.double()(tokens).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    theirs_by_name = dict(reference.named_parameters())
    # The tensors of ours that are whole ones of theirs, and the stacked experts, which transformers stacks alike.
    pairs = {
        "embedding.weight": "model.embed_tokens.weight",
        "lm_head.weight": "lm_head.weight",
        "blocks.0.attention.q_a_proj.weight": "model.layers.0.self_attn.q_a_proj.weight",
        "blocks.1.attention.kv_b_proj.weight": "model.layers.1.self_attn.kv_b_proj.weight",
        "blocks.1.ffn.router.weight": "model.layers.1.mlp.gate.weight",
        "blocks.1.ffn.experts.gate_up_proj": "model.layers.1.mlp.experts.gate_up_proj",
        "blocks.2.ffn.experts.down_proj": "model.layers.2.mlp.experts.down_proj",
        "blocks.2.ffn.shared_experts.down_proj.weight": "model.layers.2.mlp.shared_experts.down_proj.weight",
        "blocks.2.input_norm.weight": "model.layers.2.input_layernorm.weight",
    }
    for name, parameter in ours.named_parameters():
        if name in pairs:
            expected = theirs_by_name[pairs.pop(name)].grad
            assert expected is not None
            assert parameter.grad is not None
            assert (parameter.grad - expected).norm() < 1e-5 * expected.norm()
    assert not pairs


def test_a_tokenizer_that_begins_texts_with_a_token_does_so_in_prompts_and_after_an_export(
    theirs: Theirs, tmp_path: Path
) -> None:
    folder, model = theirs("llama")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>"])
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", start)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<s>"}))

    import_model(folder, tmp_path / "run", name="begun")
    export_run(tmp_path / "run", tmp_path / "hf")
    trained = load_trained(tmp_path / "run")
    ours = generate(PlainDecoder(trained.model), trained.tokenizer, "import os", 10)
    for where in (folder, tmp_path / "hf"):
        auto = AutoTokenizer.from_pretrained(where)
        ids = auto("import os", return_tensors="pt")["input_ids"]
        assert ids[0, 0] == start
        new = model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :]
        new = new[new != trained.tokenizer.eos_id]
        assert "import os" + trained.tokenizer.decode(new.tolist()) == ours.text
        assert auto.bos_token_id == start
    assert json.loads((tmp_path / "hf/config.json").read_text())["bos_token_id"] == start
    assert "add_special_tokens" not in (tmp_path / "hf/README.md").read_text()
