"""Texts to evaluate a trained model on: the splits of its own data, or files of the user's.

Each is given as prepared data whose validation split is that text, which is what `training.evaluation` evaluates. All
text of a file counts: unlike a corpus to train on, it is neither shortened by duplicates nor split.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from moe_train.config import TextFilesConfig
from moe_train.data.corpora import documents
from moe_train.data.packing import PreparedData, prepare
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import UserError
from moe_train.generation.loading import TrainedModel


def own_split(trained: TrainedModel, split: Literal["val", "train"], max_tokens: int | None) -> PreparedData:
    """A split of the data the run was trained on, prepared anew if the cache no longer has it.

    Raises UserError if what is there now is not what it was trained on.
    """
    there = trained.checkpoint.corpus_fingerprint
    if there is None:
        raise UserError(f"{trained.folder} holds weights from elsewhere and no text of its own: give files=GLOB")
    data = prepare(trained.config.data, progress=True)
    here = data.fingerprint
    if there != here:
        raise UserError(
            f"data={trained.config.data.name} is not the text {trained.folder} was trained on (fingerprint "
            f"{here[:12]}, then {there[:12]}): bring its files back, or evaluate other text with files=GLOB"
        )
    if split == "val":
        return data
    return dataclasses.replace(data, val=data.train, val_documents=_training_documents(data, trained, max_tokens))


def _training_documents(data: PreparedData, trained: TrainedModel, max_tokens: int | None) -> npt.NDArray[np.int64]:
    """Tokens and bytes up to the end of each document that the first `max_tokens` targets reach into.

    Bytes of training documents are not kept, so the tokens are decoded: exact for byte-level tokenizers, which all but
    a few published ones are. The whole split's are known.
    """
    if max_tokens is None or max_tokens >= len(data.train) - 1:
        return np.array([[len(data.train), data.meta["train_bytes"]]], np.int64)
    ends, start, size = [], 0, 0
    while start <= max_tokens:
        end = start + _document_length(data.train, start, trained.tokenizer.eos_id)
        size += len(trained.tokenizer.decode(data.train[start : end - 1].tolist()).encode())
        ends.append((end, size))
        start = end
    return np.array(ends, np.int64)


def _document_length(tokens: npt.NDArray[np.unsignedinteger], start: int, eos_id: int) -> int:
    """Tokens of the document that begins at `start`, its end token included."""
    piece = 4096
    while not (found := np.flatnonzero(tokens[start : start + piece] == eos_id)).size:
        piece *= 2
    return int(found[0]) + 1


def files(trained: TrainedModel, pattern: str, text_field: str, folder: Path, max_tokens: int | None) -> PreparedData:
    """The text of the files that match `pattern` (txt, jsonl, parquet), in tokens of the run's own tokenizer.

    `folder` takes the packed tokens and must outlive what is returned. Reading stops once `max_tokens` targets are
    there. Raises UserError if there is no text.
    """
    own = trained.config.data
    config = TextFilesConfig(
        kind="text_files",
        name="files",
        tokenizer=own.tokenizer,
        vocab_size=own.vocab_size,
        sequence_length=own.sequence_length,
        val_fraction=own.val_fraction,
        cache_dir=None,
        files=(pattern,),
        val_files=(),
        text_field=text_field,
    )
    try:
        return _packed(documents(config), trained.tokenizer, folder, max_tokens, pattern)
    except UserError as error:  # of a corpus, whose keys are called otherwise
        said = str(error).replace("data.files: no file", "files=: no file", 1)
        raise UserError(said.replace("set data.text_field to", "set text_field= to", 1)) from None


def _packed(
    texts: Iterable[str], tokenizer: Tokenizer, folder: Path, max_tokens: int | None, pattern: str
) -> PreparedData:
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")
    ends, tokens, size, digest = [], 0, 0, hashlib.sha256()
    with (folder / "val.bin").open("wb") as file:
        for text in texts:
            if not text:
                continue
            ids = [*tokenizer.encode(text), tokenizer.eos_id]
            packed = np.array(ids, dtype).tobytes()
            file.write(packed)
            digest.update(packed)
            tokens, size = tokens + len(ids), size + len(text.encode())
            ends.append((tokens, size))
            if max_tokens is not None and tokens > max_tokens:
                break
    if not ends:
        raise UserError(f"files={pattern}: there is no text in them: give others")
    packed_tokens = np.memmap(folder / "val.bin", dtype, "r")
    return PreparedData(
        path=folder,
        fingerprint=digest.hexdigest()[:32],
        tokenizer_path=folder / "tokenizer.json",
        vocab_size=tokenizer.vocab_size,
        train=packed_tokens,  # there are no other tokens
        val=packed_tokens,
        val_documents=np.array(ends, np.int64),
        meta={"val_documents": len(ends), "val_tokens": tokens, "val_bytes": size},
    )
