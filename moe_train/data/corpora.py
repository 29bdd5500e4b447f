"""Where text comes from: local Python source, the user's own files, or a dataset of the Hugging Face hub.

Each source yields its documents one by one, in an order that depends on nothing but the files, and in bounded memory.
Choosing the validation part, dropping duplicates and tokenising are packing's work.

Rows are read with json and pyarrow rather than `datasets.load_dataset("json")`, which reads a file called `a[1].jsonl`
as empty, ends on an empty file with a bare StopIteration, and does not say which line is malformed.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import gzip
import itertools
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_train.config import AnyDataConfig, HubConfig, LocalPackagesConfig, LocalPythonConfig, TextFilesConfig
from moe_train.errors import UserError, one_line

DOCUMENT_BYTES = 8 << 10  # a txt is cut at the first blank line after this
_MAX_DOCUMENT_BYTES = 64 << 10  # and at any line end after this, so that text without blank lines is cut as well
_MAX_LINE_BYTES = 1 << 20  # a longer line is cut, which bounds memory

_INSTALLED = {"site-packages", "dist-packages"}
_TESTS = {"test", "tests", "idle_test"}


def source_files(config: AnyDataConfig) -> list[Path]:
    """All local files a corpus reads, in reading order, validation files last; none for the hub."""
    match config:
        case LocalPythonConfig():
            return _standard_library()
        case LocalPackagesConfig():
            return _standard_library() + _installed_packages()
        case TextFilesConfig():
            return _matched("data.files", config.files) + _matched("data.val_files", config.val_files)
        case HubConfig():
            return []


def documents(config: AnyDataConfig) -> Iterator[str]:
    """The documents of the training source (which may hold the validation documents too)."""
    match config:
        case LocalPythonConfig() | LocalPackagesConfig():
            return _python_sources(source_files(config))
        case TextFilesConfig():
            if not config.files:
                raise UserError("data=text_files needs files to read: give data.files=[GLOB,…]")
            return _file_documents(_matched("data.files", config.files), config.text_field)
        case HubConfig():
            return itertools.islice(_hub_documents(config, config.split), config.max_documents)


def validation_documents(config: AnyDataConfig) -> Iterator[str] | None:
    """The documents of a validation source of its own, or None where a part of `documents` has to serve."""
    if isinstance(config, TextFilesConfig) and config.val_files:
        return _file_documents(_matched("data.val_files", config.val_files), config.text_field)
    if isinstance(config, HubConfig) and config.val_split is not None:
        return _hub_documents(config, config.val_split)
    return None


# -------------------------------------------------------------------------------------------------- Python source


def _standard_library() -> list[Path]:
    return _python_files(Path(sysconfig.get_path("stdlib")), without=_INSTALLED | _TESTS)


def _installed_packages() -> list[Path]:
    roots = sorted({Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")})
    return [file for root in roots for file in _python_files(root, without=_TESTS)]


def _python_files(root: Path, without: set[str]) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in without]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def _python_sources(files: list[Path]) -> Iterator[str]:
    for file in files:
        # A handful of codec examples are not UTF-8.
        with contextlib.suppress(UnicodeDecodeError):
            yield file.read_bytes().decode()


# --------------------------------------------------------------------------------------------- the user's own files


def _matched(key: str, patterns: tuple[str, ...]) -> list[Path]:
    files: set[Path] = set()
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        found = {Path(name).absolute() for name in glob.glob(expanded, recursive=True) if os.path.isfile(name)}
        if os.path.isfile(expanded):  # a name with brackets in it is a name first
            found.add(Path(expanded).absolute())
        if not found:
            raise UserError(f"{key}: no file matches {pattern!r} in {os.getcwd()}: correct the pattern")
        files |= found
    return sorted(files)


def _file_documents(files: list[Path], text_field: str) -> Iterator[str]:
    for file in files:
        if file.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _texts(_jsonl_rows(file), text_field, str(file))
        elif file.suffix == ".parquet":
            yield from _parquet_texts(file, text_field)
        else:
            yield from _text_documents(file)


def _text_documents(file: Path) -> Iterator[str]:
    """The pieces of a text file; joined they are the file."""
    start = 0
    for piece in _pieces(file):
        try:
            yield piece.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file} is not UTF-8 at byte {start + error.start}: convert it (iconv -t UTF-8) or leave it out"
            ) from None
        start += len(piece)


def _pieces(file: Path) -> Iterator[bytes]:
    piece = bytearray()
    with file.open("rb") as stream:
        while line := stream.readline(_MAX_LINE_BYTES):
            if len(line) == _MAX_LINE_BYTES:
                for _ in range(3):  # never cut inside a character: take the rest of its at most 4 bytes
                    if stream.peek(1)[:1] and stream.peek(1)[0] & 0xC0 == 0x80:
                        line += stream.read(1)
            long = len(line) > DOCUMENT_BYTES
            if long and piece:  # a long line is a document of its own
                yield bytes(piece)
                piece.clear()
            piece += line
            cut_here = long or (len(piece) >= DOCUMENT_BYTES and not line.strip())
            if cut_here or len(piece) >= _MAX_DOCUMENT_BYTES:
                yield bytes(piece)
                piece.clear()
    if piece:
        yield bytes(piece)


def _jsonl_rows(file: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
        number = 0
        try:
            for number, line in enumerate(stream, start=1):  # noqa: B007 (named in the error)
                if line.strip():
                    row = json.loads(line.decode())
                    if not isinstance(row, dict):
                        raise ValueError(f"a row must be an object, not {type(row).__name__}")
                    yield row
        except (ValueError, EOFError, gzip.BadGzipFile) as error:
            raise UserError(f"{file}, line {number}: not JSON: {one_line(error)}: correct the file") from error


def _parquet_texts(file: Path, text_field: str) -> Iterator[str]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise _no_such_column(text_field, names, str(file))
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                yield from _texts(iter(batch.to_pylist()), text_field, str(file))
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file} is not a whole parquet file: {one_line(error)}: replace it or leave it out") from error


def _texts(rows: Iterator[dict[str, Any]], text_field: str, where: str) -> Iterator[str]:
    """The text column of rows; a row whose text is null has no text and is passed over."""
    for row in rows:
        if text_field not in row:
            raise _no_such_column(text_field, list(row), where)
        text = row[text_field]
        if text is None:
            continue
        try:
            text.encode()
        except (AttributeError, UnicodeEncodeError):
            raise UserError(f"{where}: column {text_field!r} holds {text!r:.40}, which is not text") from None
        yield text


def _no_such_column(text_field: str, names: list[str], where: str) -> UserError:
    return UserError(
        f"{where} has no column {text_field!r}: set data.text_field to one of {', '.join(map(repr, names))}"
    )


# ------------------------------------------------------------------------------------------------- Hugging Face hub


def _hub_documents(config: HubConfig, split: str) -> Iterator[str]:
    where = " ".join(filter(None, (config.dataset, config.subset, split)))
    try:
        yield from _texts(_hub_rows(config, split), config.text_field, where)
    except UserError:
        raise
    except Exception as error:  # the client's own error classes change with the HTTP library beneath it
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"cannot read {where} from the Hugging Face hub ({type(error).__name__}: {one_line(error)[:200]}): check "
            "the network and the names (HF_HUB_OFFLINE=1 takes what is already downloaded), or stay offline with "
            "data=local_python or data=text_files"
        ) from error


def _hub_rows(config: HubConfig, split: str) -> Iterator[dict[str, Any]]:
    import datasets
    import huggingface_hub

    if not huggingface_hub.is_offline_mode() and not os.path.isdir(config.dataset):
        # Fails at once; load_dataset retries for 23 seconds and then does not say whether name or network is wrong.
        huggingface_hub.HfApi().dataset_info(config.dataset, timeout=10)
    yield from datasets.load_dataset(config.dataset, config.subset, split=split, streaming=config.streaming)
