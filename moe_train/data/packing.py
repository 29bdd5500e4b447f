"""Documents to a packed token file, prepared once and kept in a cache folder.

Each document's tokens are followed by the end-of-text token. The folder is written beside its place and renamed, under
a lock, so that several jobs prepare once and a kill leaves nothing that would later be taken for whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import numpy.typing as npt
import platformdirs
from rich.console import Console
from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

from moe_train.config import AnyDataConfig, to_dict
from moe_train.data.corpora import source_files
from moe_train.data.splitting import DistinctDocuments, Document
from moe_train.data.tokenizer import Tokenizer, bytes_tokenizer, pretrained_tokenizer, train_bpe
from moe_train.errors import UserError

_FORMAT = 1  # raise it when what a folder holds, or how text becomes tokens, changes
_TRAINING_BYTES = 20_000_000  # of text the BPE is trained on
_BATCH_BYTES = 1_000_000  # of text tokenised at once: bounds memory, and is enough to keep all cores at work


@dataclass(frozen=True)
class PreparedData:
    """A packed corpus: `train` and `val` are 1-D memory-mapped token arrays, each document ended by the end token."""

    path: Path
    fingerprint: str  # of documents, their order and split, and the tokenizer: equal on any machine with the same text
    tokenizer_path: Path
    vocab_size: int
    train: np.memmap[Any, np.dtype[Any]]
    val: np.memmap[Any, np.dtype[Any]]
    val_documents: npt.NDArray[
        np.int64
    ]  # (documents, 2): tokens (end token included) and UTF-8 bytes up to each one's end
    meta: dict[str, Any]  # meta.json: counts, bytes, entropy, configuration

    def val_bytes(self, num_targets: int) -> float:
        """Bytes of text up to the last of the first `num_targets` validation targets, for bits per byte.

        Exact where a document ends there, linear in tokens inside one. The very first token, never a target, counts in.
        """
        ends = np.vstack([np.zeros((1, 2), np.int64), self.val_documents])
        return float(np.interp(num_targets + 1, ends[:, 0], ends[:, 1]))


def prepare(config: AnyDataConfig, progress: bool) -> PreparedData:
    """The packed corpus of `config`, made now if it is not in the cache yet. `progress` shows a bar on stderr.

    The cache is `cache_dir`, else the environment's MOE_TRAIN_CACHE, else the user's cache folder. UserError: the
    source cannot be read, it is empty, one of the two splits would be empty, or a cached folder is damaged.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    cache = Path(config.cache_dir or os.environ.get("MOE_TRAIN_CACHE") or platformdirs.user_cache_dir("moe_train"))
    cache = cache.expanduser().absolute()
    path = cache / f"{config.kind}-{_cache_key(config)}"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache)
        with filelock.FileLock(_lock_of(path)):
            if not path.exists():
                _write(config, path, progress)
    return _load(path)


def _cache_key(config: AnyDataConfig) -> str:
    settings = to_dict(config)
    for key in ("name", "sequence_length", "cache_dir"):
        del settings[key]
    files = source_files(config)
    tokenizer_folder = Path(config.tokenizer).expanduser()
    if config.tokenizer not in ("bpe", "bytes") and tokenizer_folder.is_dir():
        files += sorted(tokenizer_folder.glob("*.json"))
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    what = json.dumps([_FORMAT, settings, platform.python_version() if files else None, stamps], sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _partial_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _remove_abandoned(cache: Path) -> None:
    """Delete what killed jobs left half made: folders nobody holds the lock of."""
    for partial in cache.glob("*.partial"):
        with contextlib.suppress(filelock.Timeout), filelock.FileLock(_lock_of(partial.with_suffix("")), timeout=0):
            if partial.exists():  # else whoever had the lock has finished it meanwhile
                shutil.rmtree(partial)


# -------------------------------------------------------------------------------------------------------- writing


class _Split:
    """One split's token file while it is written, and what is counted on the way."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.file = path.open("wb")
        self.dtype = np.dtype(dtype)
        self.hash = hashlib.sha256()
        self.documents = self.tokens = self.bytes = 0
        self.ends = array("q")
        self.histogram = np.zeros(256, np.int64)

    def add(self, document: Document, ids: list[int]) -> None:
        self.file.write(np.array(ids, self.dtype).tobytes())
        self.hash.update(document.digest)
        self.documents += 1
        self.tokens += len(ids)
        self.bytes += document.size
        if document.validation:
            self.ends.extend((self.tokens, self.bytes))
            self.histogram += np.bincount(np.frombuffer(document.text.encode(), np.uint8), minlength=256)

    def entropy(self) -> float:
        """Bits a byte that a model knowing only how frequent each byte is would need."""
        share = self.histogram[self.histogram > 0] / self.histogram.sum()
        return float(-(share * np.log2(share)).sum())


def _write(config: AnyDataConfig, path: Path, progress: bool) -> None:
    partial = _partial_of(path)
    shutil.rmtree(partial, ignore_errors=True)  # left by a job that died while this one waited for the lock
    partial.mkdir()
    try:
        _write_files(config, partial, progress)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_files(config: AnyDataConfig, folder: Path, progress: bool) -> None:
    console = Console(stderr=True)
    console.quiet = not (progress and console.is_terminal)  # a disabled Progress still prints an empty line
    columns = ("{task.description}", "{task.fields[documents]:,} documents")
    with Progress(
        SpinnerColumn(),
        *map(TextColumn, columns),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
    ) as bar:
        tokenizer = _tokenizer(config, bar)
        tokenizer.save(folder)
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        train, val = _Split(folder / "train.bin", dtype), _Split(folder / "val.bin", dtype)
        task = bar.add_task("tokenising", total=None, documents=0)
        stream = DistinctDocuments(config)
        with train.file, val.file:
            for batch in _batches(stream):
                for document, ids in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
                    (val if document.validation else train).add(document, [*ids, tokenizer.eos_id])
                bar.update(task, documents=train.documents + val.documents, completed=train.bytes + val.bytes)
    _require_both(config, train.documents, val.documents)

    np.save(folder / "val_documents.npy", np.array(val.ends, np.int64).reshape(-1, 2))
    fingerprint = hashlib.sha256(train.hash.digest() + val.hash.digest() + (folder / "tokenizer.json").read_bytes())
    meta = {
        "fingerprint": fingerprint.hexdigest()[:32],
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "duplicates_dropped": stream.dropped,
        "train_documents": train.documents,
        "train_tokens": train.tokens,
        "train_bytes": train.bytes,
        "val_documents": val.documents,
        "val_tokens": val.tokens,
        "val_bytes": val.bytes,
        "val_unigram_bits_per_byte": val.entropy(),
        "config": to_dict(config),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _tokenizer(config: AnyDataConfig, bar: Progress) -> Tokenizer:
    if config.tokenizer == "bytes":
        return bytes_tokenizer()
    if config.tokenizer != "bpe":
        return pretrained_tokenizer(config.tokenizer)

    task = bar.add_task("training the tokenizer", total=None, documents=0)

    def head() -> Iterator[str]:
        size = 0
        for document in DistinctDocuments(config):
            if not document.validation:
                yield document.text
                size += document.size
                bar.update(task, advance=document.size, documents=bar.tasks[task].fields["documents"] + 1)
                if size >= _TRAINING_BYTES:
                    return

    tokenizer = train_bpe(head(), config.vocab_size)
    bar.remove_task(task)
    return tokenizer


def _batches(stream: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in stream:
        batch.append(document)
        size += document.size
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _require_both(config: AnyDataConfig, train: int, val: int) -> None:
    if not train + val:
        raise UserError(f"data={config.name} has no text: give another source, or other data.files")
    if not val:
        raise UserError(
            f"data.val_fraction={config.val_fraction} chose none of the {train} documents of data={config.name} for "
            "validation: raise it, give more text, or give data.val_files (data=text_files)"
        )
    if not train:
        raise UserError(
            f"all {val} documents of data={config.name} are validation documents: lower data.val_fraction, or give "
            "training text that is not in the validation source"
        )


# -------------------------------------------------------------------------------------------------------- reading


def _load(path: Path) -> PreparedData:
    try:
        meta = json.loads((path / "meta.json").read_text())
        val_documents = np.load(path / "val_documents.npy")
        for split in ("train", "val"):
            size, expected = (
                (path / f"{split}.bin").stat().st_size,
                meta[f"{split}_tokens"] * np.dtype(meta["dtype"]).itemsize,
            )
            if size != expected:
                raise ValueError(f"{split}.bin has {size} bytes instead of {expected}")
        train, val = (np.memmap(path / f"{split}.bin", meta["dtype"], "r") for split in ("train", "val"))
    except (FileNotFoundError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"prepared data in {path} is damaged ({error}): delete that folder, it is made anew") from error
    return PreparedData(
        path=path,
        fingerprint=meta["fingerprint"],
        tokenizer_path=path / "tokenizer.json",
        vocab_size=meta["vocab_size"],
        train=train,
        val=val,
        val_documents=val_documents,
        meta=meta,
    )
