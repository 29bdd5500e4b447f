"""transformers → ours → transformers: the same logits, the same text, the same bits, for every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import CASES, gradients_on_disk, largest_difference, load_theirs
from tokenizers import Tokenizer, processors
from torch import nn
from transformers import AutoTokenizer

from moe_train.generation import PlainDecoder, generate, load_trained
from moe_train.interop.export import export_run
from moe_train.interop.importing import import_model, read_config
from moe_train.interop.names import places

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


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_transformers(case: str, theirs: Theirs, tokens: torch.Tensor, tmp_path: Path) -> None:
    folder, reference = theirs(case)
    import_model(folder, tmp_path / "ours")
    ours = load_trained(tmp_path / "ours").model
    targets = tokens.roll(-1, 1)
    ours(tokens, targets).objective.backward()
    logits = reference(tokens).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    family, their_settings = read_config(folder)
    names = family.names_of(their_settings)
    found = gradients_on_disk(reference, names)
    where = places(ours.config, names)
    parts = {place.theirs for name, _ in ours.named_parameters() for place in where[name]}
    assert {name for name in found if found[name].numel()} == parts
    # FP32: each gradient is a sum over 80 tokens, rounded in another order. The largest seen of any tensor was 3e-6.
    assert largest_difference(ours, where, found) < 1e-5


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
