"""Packed data is the corpus, split by content, made once, and never half made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

from moe_train.config import TextFilesConfig
from moe_train.data import packing
from moe_train.data.packing import PreparedData, prepare
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import UserError

TEXTS = [f"document {i}: " + "some words and é " * (i % 5) + "\n" for i in range(60)]


def config_for(folder: Path, texts: list[str] = TEXTS, **changes: Any) -> TextFilesConfig:
    """A corpus of one document a row in `folder`, with its cache beside it."""
    folder.mkdir(exist_ok=True)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "corpus.jsonl").write_text(rows)
    settings: dict[str, Any] = {
        "name": "mine",
        "kind": "text_files",
        "tokenizer": "bytes",
        "vocab_size": 300,
        "sequence_length": 8,
        "val_fraction": 0.3,
        "cache_dir": str(folder / "cache"),
        "files": (str(folder / "corpus.jsonl"),),
        "val_files": (),
        "text_field": "text",
    }
    return TextFilesConfig(**(settings | changes))


def split_texts(data: PreparedData, split: np.ndarray) -> list[str]:
    tokenizer = Tokenizer.load(data.tokenizer_path)
    ends = np.flatnonzero(split == tokenizer.eos_id)
    assert ends[-1] == len(split) - 1
    starts = [0, *(ends[:-1] + 1)]
    return [tokenizer.decode(split[start:end].tolist()) for start, end in zip(starts, ends, strict=True)]


def chosen_for_validation(text: str, fraction: float) -> bool:
    return int(hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), 16) / 16**32 < fraction


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_both_splits_together_are_the_corpus_in_order_each_document_ended(tmp_path: Path, tokenizer: str) -> None:
    data = prepare(config_for(tmp_path, tokenizer=tokenizer), progress=False)
    assert split_texts(data, data.train) == [text for text in TEXTS if not chosen_for_validation(text, 0.3)]
    assert split_texts(data, data.val) == [text for text in TEXTS if chosen_for_validation(text, 0.3)]
    assert data.train.dtype == np.uint16
    assert int(data.train.max()) < data.vocab_size <= 300


def test_a_document_changes_sides_for_no_change_elsewhere(tmp_path: Path) -> None:
    small = prepare(config_for(tmp_path, TEXTS[20:40]), progress=False)
    large = prepare(config_for(tmp_path, TEXTS[::-1]), progress=False)
    assert set(split_texts(small, small.val)) <= set(split_texts(large, large.val))
    assert set(split_texts(small, small.train)) <= set(split_texts(large, large.train))


def test_exact_duplicates_and_empty_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    once = prepare(config_for(tmp_path / "once"), progress=False)
    twice = prepare(config_for(tmp_path / "twice", [*TEXTS, "", *TEXTS[:7]]), progress=False)
    assert once.fingerprint == twice.fingerprint
    assert (once.meta["duplicates_dropped"], twice.meta["duplicates_dropped"]) == (0, 8)
    assert twice.meta["train_documents"] + twice.meta["val_documents"] == len(TEXTS)


def test_what_stands_in_the_validation_files_is_not_trained_on(tmp_path: Path) -> None:
    own = tmp_path / "val.jsonl"
    own.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS[:3], "only here"]))
    data = prepare(config_for(tmp_path, val_files=(str(own),), tokenizer="bpe"), progress=False)
    assert split_texts(data, data.val) == [*TEXTS[:3], "only here"]
    assert split_texts(data, data.train) == TEXTS[3:]


def test_the_tokenizer_has_seen_no_validation_text(tmp_path: Path) -> None:
    own = tmp_path / "val.jsonl"
    own.write_text(json.dumps({"text": "qzqzqzqz " * 99}))
    config = config_for(tmp_path, [*TEXTS, "qzqzqzqz " * 99], val_files=(str(own),), tokenizer="bpe", vocab_size=500)
    tokenizer = Tokenizer.load(prepare(config, progress=False).tokenizer_path)
    assert len(tokenizer.encode("qzqzqzqz")) == 8


def test_bytes_of_a_validation_prefix_are_exact_at_document_ends_and_between_inside(tmp_path: Path) -> None:
    data = prepare(config_for(tmp_path, tokenizer="bpe"), progress=False)
    texts = split_texts(data, data.val)
    tokenizer = Tokenizer.load(data.tokenizer_path)
    tokens = total = 0
    for text in texts:
        before, first = total, tokens
        tokens += len(tokenizer.encode(text)) + 1
        total += len(text.encode())
        assert data.val_bytes(tokens - 1) == total
        middle = (first + tokens) // 2
        assert data.val_bytes(middle - 1) == pytest.approx(
            before + (total - before) * (middle - first) / (tokens - first)
        )
    assert tokens == len(data.val)


def test_meta_counts_the_corpus_and_the_entropy_of_its_validation_bytes(tmp_path: Path) -> None:
    data = prepare(config_for(tmp_path), progress=False)
    val = "".join(split_texts(data, data.val)).encode()
    assert data.meta["val_bytes"] == len(val)
    assert data.meta["train_bytes"] + len(val) == len("".join(TEXTS).encode())
    assert (data.meta["train_tokens"], data.meta["val_tokens"]) == (len(data.train), len(data.val))
    entropy = -sum(n / len(val) * math.log2(n / len(val)) for n in Counter(val).values())
    assert data.meta["val_unigram_bits_per_byte"] == pytest.approx(entropy)


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(Tokenizer):
        @property
        def vocab_size(self) -> int:
            return 65537

        @vocab_size.setter
        def vocab_size(self, _: int) -> None: ...

        def encode_batch(self, texts: Any) -> list[list[int]]:
            return [[65536] for _ in texts]

    real = packing.bytes_tokenizer()
    monkeypatch.setattr(packing, "bytes_tokenizer", lambda: Large(real._backend, "<|endoftext|>"))
    data = prepare(config_for(tmp_path), progress=False)
    assert data.train.dtype == np.uint32
    assert data.train[:2].tolist() == [65536, 256]


def test_the_progress_bar_keeps_out_of_stdout_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = prepare(config_for(tmp_path / "shown", tokenizer="bpe"), progress=True)
    silent = prepare(config_for(tmp_path / "silent", tokenizer="bpe"), progress=False)
    assert shown.fingerprint == silent.fingerprint
    assert capsys.readouterr().out == ""


# ----------------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_knows_the_text_and_not_the_place(tmp_path: Path) -> None:
    here = prepare(config_for(tmp_path / "here", tokenizer="bpe"), progress=False)
    there = prepare(config_for(tmp_path / "there", tokenizer="bpe", sequence_length=16, name="other"), progress=False)
    assert here.fingerprint == there.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"texts": [*TEXTS, "more"]},
        {"texts": TEXTS[::-1]},
        {"tokenizer": "bpe"},
        {"val_fraction": 0.5},
    ],
    ids=["more text", "another order", "another tokenizer", "another split"],
)
def test_the_fingerprint_changes_with_what_is_learnt_from(tmp_path: Path, change: dict[str, Any]) -> None:
    plain = prepare(config_for(tmp_path / "plain"), progress=False)
    changed = prepare(config_for(tmp_path / "changed", **change), progress=False)
    assert plain.fingerprint != changed.fingerprint


def test_the_fingerprint_changes_with_the_validation_text_alone(tmp_path: Path) -> None:
    fingerprints = set()
    for text in ("one", "two"):
        own = tmp_path / f"{text}.txt"
        own.write_text(text)
        fingerprints.add(prepare(config_for(tmp_path, val_files=(str(own),)), progress=False).fingerprint)
    assert len(fingerprints) == 2


# ----------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders written, each time one is."""
    folders: list[Path] = []
    write = packing._write

    def recorded(config: Any, path: Path, progress: bool) -> None:
        folders.append(path)
        write(config, path, progress)

    monkeypatch.setattr(packing, "_write", recorded)
    return folders


def test_data_is_prepared_once_for_all_sequence_lengths_and_again_when_a_file_changes(
    tmp_path: Path, written: list[Path]
) -> None:
    config = config_for(tmp_path)
    for length in (8, 8, 16):
        prepare(dataclasses.replace(config, sequence_length=length), progress=False)
    assert len(written) == 1
    prepare(config_for(tmp_path, [*TEXTS, "another"]), progress=False)
    prepare(dataclasses.replace(config, val_fraction=0.4), progress=False)
    assert len(set(written)) == 3


def test_jobs_at_the_same_time_prepare_once(tmp_path: Path, written: list[Path]) -> None:
    config = config_for(tmp_path, tokenizer="bpe")
    results: list[PreparedData] = []
    jobs = [threading.Thread(target=lambda: results.append(prepare(config, progress=False))) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(written) == 1
    assert len({data.fingerprint for data in results}) == 1
    assert len(results) == 4


def test_what_another_job_finishes_meanwhile_is_not_cleared_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was half made when it was listed, and whole when its lock was free."""
    config = config_for(tmp_path)
    cache = Path(str(config.cache_dir))
    cache.mkdir()
    other = cache / "text_files-other.partial"
    other.mkdir()
    lock = packing.filelock.FileLock

    def finished_meanwhile(path: Path, **settings: Any) -> Any:
        if path.name.startswith("text_files-other"):
            other.rename(other.with_suffix(""))
        return lock(path, **settings)

    monkeypatch.setattr(packing.filelock, "FileLock", finished_meanwhile)
    prepare(config, progress=False)
    assert other.with_suffix("").is_dir()


def test_the_cache_folder_is_the_settings_then_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_TRAIN_CACHE", str(tmp_path / "environment"))
    config = config_for(tmp_path)
    assert prepare(config, progress=False).path.parent == tmp_path / "cache"
    assert prepare(dataclasses.replace(config, cache_dir=None), progress=False).path.parent == tmp_path / "environment"


def test_a_killed_job_leaves_nothing_that_is_used_and_the_next_clears_up(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    program = (
        "import os, signal, sys; from moe_train.data import packing; sys.path.insert(0, 'tests/data')\n"
        "from pathlib import Path; from test_packing import config_for\n"
        "packing.np.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "packing.prepare(config_for(Path(sys.argv[1]), ['another corpus', *map(str, range(50))]), False)"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    job = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=root, env=environment)
    assert job.returncode == -signal.SIGKILL
    assert list((tmp_path / "cache").glob("*.partial/train.bin"))

    data = prepare(config_for(tmp_path), progress=False)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [data.path]
    assert len(split_texts(data, data.train)) + len(split_texts(data, data.val)) == len(TEXTS)
    assert config.cache_dir == str(data.path.parent)


def test_what_another_job_is_writing_is_left_alone(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    busy = tmp_path / "cache" / "text_files-0123.partial"
    busy.mkdir(parents=True)
    with filelock.FileLock(tmp_path / "cache" / "text_files-0123.lock"):
        prepare(config, progress=False)
    assert busy.exists()


def test_a_failure_while_writing_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing.np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(config_for(tmp_path), progress=False)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "val_documents.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["cut off", "missing"])
def test_a_damaged_cache_folder_is_named(tmp_path: Path, name: str, damage: str) -> None:
    config = config_for(tmp_path)
    file = prepare(config, progress=False).path / name
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 2)
    with pytest.raises(UserError, match=f"{file.parent} is damaged.*delete"):
        prepare(config, progress=False)


# ---------------------------------------------------------------------------------------------------------- errors


def test_an_empty_corpus_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text"):
        prepare(config_for(tmp_path, [""]), progress=False)


def test_a_split_without_documents_is_an_error_that_says_how_many_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"val_fraction=1e-09 chose none of the 60 documents.*data\.val_files"):
        prepare(config_for(tmp_path, val_fraction=1e-9), progress=False)
    with pytest.raises(UserError, match="all 60 documents"):
        prepare(config_for(tmp_path, val_fraction=1 - 1e-9), progress=False)
