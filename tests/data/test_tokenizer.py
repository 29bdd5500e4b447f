"""Tokenizers lose nothing, never end a document early, and are the same for the same text."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.data.tokenizer import END_OF_TEXT, Tokenizer, bytes_tokenizer, pretrained_tokenizer, train_bpe
from moe_train.errors import UserError

TEXTS = [f"the {i % 7} quick brown foxes jump over the lazy dogs\n\treturn {i}\n" for i in range(200)]
BPE = train_bpe(TEXTS, 400)
BYTES = bytes_tokenizer()
any_text = st.text() | st.sampled_from(["<|endoftext|>", "a<|endoftext|>b", "\r\n \t x", "日本語🙂\0"])


@given(any_text)
def test_bpe_gives_back_any_text(text: str) -> None:
    assert BPE.decode(BPE.encode(text)) == text


@given(any_text)
def test_byte_tokens_are_the_utf8_bytes(text: str) -> None:
    assert BYTES.encode(text) == list(text.encode())
    assert BYTES.decode(BYTES.encode(text)) == text


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_the_end_token_written_in_a_text_is_ordinary_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"before {END_OF_TEXT} after")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode([tokenizer.eos_id]) == END_OF_TEXT


def test_bpe_compresses_what_it_was_trained_on() -> None:
    assert sum(map(len, BPE.encode_batch(TEXTS))) < 0.4 * sum(map(len, BYTES.encode_batch(TEXTS)))


def test_ids_are_below_the_vocabulary_size() -> None:
    assert BPE.vocab_size <= 400
    assert BYTES.vocab_size == 257
    assert max(max(ids) for ids in BPE.encode_batch(TEXTS)) < BPE.vocab_size


def test_a_small_corpus_gives_a_small_vocabulary_and_is_not_learnt_by_heart() -> None:
    assert train_bpe(["each word here stands once"], 4096).vocab_size == 257


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        text = f"the lazy {END_OF_TEXT} 日本"
        assert loaded.encode(text) == tokenizer.encode(text)
        assert (loaded.eos_id, loaded.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)


def test_training_is_the_same_for_any_number_of_threads(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from moe_train.data.tokenizer import train_bpe\n"
        "train_bpe([f'{i * i} words {i:b} {i:x}\\n' * 3 for i in range(3000)], 1000).save(Path(sys.argv[1]))"
    )
    digests = set()
    for threads in ("1", "2", "5"):
        folder = tmp_path / threads
        folder.mkdir()
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        subprocess.run(
            [sys.executable, "-c", program, folder], check=True, env=environment, cwd=Path(__file__).parents[2]
        )
        digests.add(hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_saved_folder_serves_as_a_hugging_face_tokenizer(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    loaded = pretrained_tokenizer(str(tmp_path))
    assert loaded.encode(TEXTS[3] + END_OF_TEXT) == BPE.encode(TEXTS[3] + END_OF_TEXT)
    assert loaded.eos_id == BPE.eos_id


def test_a_hugging_face_tokenizer_adds_no_special_tokens(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    eos = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [eos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [eos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [BPE.eos_id], "tokens": [END_OF_TEXT]}},
    }
    file.write_text(json.dumps(content))
    loaded = pretrained_tokenizer(str(tmp_path))
    assert loaded.encode("lazy") == BPE.encode("lazy")
    assert loaded.prefix_ids == [BPE.eos_id]  # known, for prompts
    assert BPE.prefix_ids == []


def test_a_tokenizer_without_an_end_token_is_an_error(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="no end-of-text token"):
        pretrained_tokenizer(str(tmp_path))


def test_an_unknown_tokenizer_is_one_error_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"data\.tokenizer=no-such-name.*data\.tokenizer=bpe"):
        pretrained_tokenizer("no-such-name")
