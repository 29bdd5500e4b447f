"""Texts to evaluate on: the run's own splits and files of the user's, with their bytes counted exactly."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from moe_train.config import RunConfig
from moe_train.data.packing import PreparedData, prepare
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import UserError
from moe_train.evaluation import texts
from moe_train.evaluation.losses import _runtime
from moe_train.generation import TrainedModel
from moe_train.model.transformer import Transformer
from moe_train.training.checkpoints import Checkpoint
from moe_train.training.evaluation import evaluate


@pytest.fixture(params=["bytes", "bpe"])
def trained(
    request: pytest.FixtureRequest, tmp_path: Path, text_corpus: Path, compose_run: Callable[..., RunConfig]
) -> TrainedModel:
    """A model that was never trained, over a corpus that was prepared."""
    config = compose_run(
        "data=text_files",
        f"data.tokenizer={request.param}",
        "data.vocab_size=300",
        "precision=fp32",
        f"data.files=[{text_corpus}/*.jsonl]",
        f"data.cache_dir={tmp_path / 'cache'}",
    )
    data = prepare(config.data, progress=False)
    model = Transformer(config.model.resolved(), data.vocab_size)
    model.initialise(0)
    state = {"corpus_fingerprint": data.fingerprint, "step": 0}
    return TrainedModel(model, Tokenizer.load(data.path), config, Checkpoint(tmp_path, state), tmp_path)


def bytes_of_documents(trained: TrainedModel, tokens: np.ndarray, documents: int) -> list[tuple[int, int]]:
    """Tokens and bytes up to the end of each of the first documents, one at a time from their text."""
    ends, start, size = [], 0, 0
    for end in (np.flatnonzero(tokens == trained.tokenizer.eos_id) + 1).tolist()[:documents]:
        size += len(trained.tokenizer.decode(tokens[start : end - 1].tolist()).encode())
        ends.append((end, size))
        start = end
    return ends


def test_the_validation_split_is_the_prepared_one(trained: TrainedModel) -> None:
    data = prepare(trained.config.data, progress=False)
    text = texts.own_split(trained, "val", None)
    assert np.array_equal(text.val, data.val)
    assert text.val_bytes(len(data.val) - 1) == data.meta["val_bytes"]


def test_the_bytes_of_the_training_split_are_exact_at_every_end_of_a_document(trained: TrainedModel) -> None:
    data = prepare(trained.config.data, progress=False)
    for tokens, size in bytes_of_documents(trained, data.train, 5):
        for limit in (tokens - 1, tokens, tokens + 3):
            text = texts.own_split(trained, "train", limit)
            assert text.val_bytes(tokens - 1) == size
            assert np.array_equal(text.val, data.train)
    whole = texts.own_split(trained, "train", None)
    assert whole.val_bytes(len(data.train) - 1) == data.meta["train_bytes"]


def test_a_training_document_longer_than_one_look_is_found_whole(trained: TrainedModel) -> None:
    eos = trained.tokenizer.eos_id
    tokens = np.array([*[eos + 1] * 20_000, eos, 1, eos], np.uint16)
    assert texts._document_length(tokens, 0, eos) == 20_001
    assert texts._document_length(tokens, 20_001, eos) == 2


def test_another_text_than_the_run_was_trained_on_is_refused(trained: TrainedModel) -> None:
    trained.checkpoint.state["corpus_fingerprint"] = "0" * 32
    with pytest.raises(UserError, match=r"not the text .* was trained on .*files=GLOB"):
        texts.own_split(trained, "val", None)
    trained.checkpoint.state["corpus_fingerprint"] = None
    with pytest.raises(UserError, match="weights from elsewhere"):
        texts.own_split(trained, "val", None)


def write_files(folder: Path) -> list[str]:
    """One file of each kind; returns their documents in reading order, those without text left out."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    rows = [{"text": "über ≠ ascii", "body": "one"}, {"text": "", "body": "two"}, {"text": "über ≠ ascii", "body": "x"}]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["from a column", "and another"]}), folder / "b.parquet")
    (folder / "c.txt").write_text("plain words\n")
    return ["über ≠ ascii", "über ≠ ascii", "from a column", "and another", "plain words\n"]


def test_files_of_every_kind_are_read_whole_with_the_runs_tokenizer(trained: TrainedModel, tmp_path: Path) -> None:
    documents = write_files(tmp_path / "mine")
    text = texts.files(trained, f"{tmp_path}/mine/*", "text", tmp_path, None)
    expected = [i for d in documents for i in [*trained.tokenizer.encode(d), trained.tokenizer.eos_id]]
    assert text.val.tolist() == expected
    assert text.val_bytes(len(expected) - 1) == sum(len(d.encode()) for d in documents)
    assert text.vocab_size == trained.tokenizer.vocab_size


def test_reading_files_stops_when_there_are_enough_tokens(trained: TrainedModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words of text\n" * 10)
    (tmp_path / "b.txt").write_bytes(b"\xff")  # would be refused
    first = texts.files(trained, f"{tmp_path}/*.txt", "text", tmp_path, 5)
    assert first.val_bytes(len(first.val) - 1) == 190


@pytest.mark.parametrize(
    ("pattern", "field", "message"),
    [
        ("nothing*", "text", r"^files=: no file matches"),
        ("a.jsonl", "words", r"set text_field= to one of 'text', 'body'"),
        ("empty.txt", "text", r"files=.*: there is no text in them"),
    ],
)
def test_files_that_cannot_be_used_are_one_error(
    trained: TrainedModel, tmp_path: Path, pattern: str, field: str, message: str
) -> None:
    write_files(tmp_path / "mine")
    (tmp_path / "mine/empty.txt").write_text("")
    with pytest.raises(UserError, match=message):
        texts.files(trained, f"{tmp_path}/mine/{pattern}", field, tmp_path, None)


def test_a_run_that_insisted_on_cuda_graphs_is_evaluated_where_there_are_none(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    insisted = trained._replace(config=dataclasses.replace(trained.config, cuda_graphs="always"))
    assert not _runtime(insisted, "torch", 1).cuda_graphs
    AcceleratorState._reset_state(reset_partial_state=True)


def test_bits_per_byte_of_a_text_are_those_of_a_loop_over_its_tokens(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = write_files(tmp_path / "mine")
    text: PreparedData = texts.files(trained, f"{tmp_path}/mine/*", "text", tmp_path, None)
    model = trained.model.eval()
    model.initialise(0)
    ids = torch.from_numpy(text.val.astype(np.int64))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 16):
            window = ids[start : start + 17]
            scores = model.logits(window[None, :-1])[0].log_softmax(-1)
            nats -= scores.gather(1, window[1:, None]).sum().item()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    measured = evaluate(model, text, _runtime(trained, "torch", 1), sequence_length=16, batch_size=3, max_tokens=None)
    assert measured.loss == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    size = sum(len(d.encode()) for d in documents)
    assert measured.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    AcceleratorState._reset_state(reset_partial_state=True)  # the next test may want another precision
