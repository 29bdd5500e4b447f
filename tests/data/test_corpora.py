"""Corpora yield whole texts in a fixed order, in bounded memory, and name what they cannot read."""

from __future__ import annotations

import gzip
import json
import os
import sysconfig
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.config import HubConfig, LocalPackagesConfig, LocalPythonConfig, TextFilesConfig
from moe_train.data import corpora
from moe_train.data.corpora import documents, source_files, validation_documents
from moe_train.errors import UserError

COMMON: dict[str, Any] = {
    "name": "test",
    "tokenizer": "bytes",
    "vocab_size": 300,
    "sequence_length": 8,
    "val_fraction": 0.1,
    "cache_dir": None,
}


def text_files(*files: object, val_files: tuple[object, ...] = (), text_field: str = "text") -> TextFilesConfig:
    return TextFilesConfig(
        **COMMON,
        kind="text_files",
        files=tuple(map(str, files)),
        val_files=tuple(map(str, val_files)),
        text_field=text_field,
    )


def hub(dataset: object, **changes: Any) -> HubConfig:
    settings: dict[str, Any] = {
        "subset": None,
        "split": "train",
        "val_split": None,
        "text_field": "text",
        "streaming": True,
        "max_documents": None,
    }
    return HubConfig(**COMMON, kind="hub", dataset=str(dataset), **(settings | changes))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# -------------------------------------------------------------------------------------------------- Python source


@pytest.fixture
def python_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "b.py",
        "a/z.py",
        "a/data.txt",
        "test/x.py",
        "a/tests/x.py",
        "idlelib/idle_test/x.py",
        "site-packages/p/m.py",
        "site-packages/p/tests/m.py",
        "dist-packages/q.py",
    ):
        write(tmp_path / name, f"# {name}\r\n")
    write(tmp_path / "latin.py", "# é".encode("latin1"))
    paths = {"stdlib": tmp_path, "purelib": tmp_path / "site-packages", "platlib": tmp_path / "site-packages"}
    monkeypatch.setattr(sysconfig, "get_path", lambda key: str(paths[key]))
    return tmp_path


def test_local_python_is_the_library_without_packages_tests_and_undecodable_files(python_tree: Path) -> None:
    config = LocalPythonConfig(**COMMON, kind="local_python")
    assert list(documents(config)) == ["# a/z.py\r\n", "# b.py\r\n"]
    assert validation_documents(config) is None


def test_local_packages_adds_each_installed_package_once(python_tree: Path) -> None:
    config = LocalPackagesConfig(**COMMON, kind="local_packages")
    assert list(documents(config)) == ["# a/z.py\r\n", "# b.py\r\n", "# site-packages/p/m.py\r\n"]


def test_this_pythons_own_library_is_found() -> None:
    files = source_files(LocalPythonConfig(**COMMON, kind="local_python"))
    assert Path(os.__file__) in files
    assert len(files) > 300


# ------------------------------------------------------------------------------------------------------ text files


@given(st.lists(st.sampled_from(["\n", " \n", "word\n", "é" * 3000 + "\n", "line " * 500 + "\n"]), max_size=60))
def test_a_text_files_documents_joined_are_the_file(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    file = write(tmp_path_factory.mktemp("t") / "a.txt", "".join(lines))
    found = list(documents(text_files(file)))
    assert "".join(found) == "".join(lines)
    assert all(found)


def test_a_text_is_cut_at_the_first_blank_line_after_8_kib(tmp_path: Path) -> None:
    paragraph = "x" * 99 + "\n"
    head = paragraph * 50 + "\n" + paragraph * 50
    rest = paragraph * 3 + "\n" + paragraph
    file = write(tmp_path / "a.md", head + " \t\n" + rest)
    assert list(documents(text_files(file))) == [head + " \t\n", rest]


def test_a_long_line_is_a_document_of_its_own(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "short\n" + "x" * 9000 + "\nafter\n")
    assert list(documents(text_files(file))) == ["short\n", "x" * 9000 + "\n", "after\n"]


def test_a_text_without_blank_lines_is_cut_at_line_ends(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "some words\n" * 100_000)
    found = list(documents(text_files(file)))
    assert max(map(len, found)) < 70_000
    assert all(document.endswith("\n") for document in found)


def test_a_huge_line_of_long_characters_is_read_in_bounded_memory(tmp_path: Path) -> None:
    size = 8_000_000  # 32 MB
    file = write(tmp_path / "a.txt", "aaa" + "🙂" * size)  # a MiB ends after one byte of a character
    tracemalloc.start()
    characters = sum(map(len, documents(text_files(file))))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert characters == size + 3
    assert peak < 12_000_000


def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path: Path) -> None:
    text = ("word\n" * 40_000).encode()
    file = write(tmp_path / "a.txt", text + "é".encode("latin1") + text)
    with pytest.raises(UserError, match=rf"a\.txt is not UTF-8 at byte {len(text)}:"):
        list(documents(text_files(file)))


def test_globs_are_recursive_relative_sorted_and_match_a_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b.txt", "deep/er/a.txt", "c[1].txt", "b.md"):
        write(tmp_path / name, name)
    monkeypatch.chdir(tmp_path)
    assert list(documents(text_files("**/*.txt", "b.txt"))) == ["b.txt", "c[1].txt", "deep/er/a.txt"]
    assert list(documents(text_files("c[1].txt"))) == ["c[1].txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(documents(text_files("~/b.md"))) == ["b.md"]


@pytest.mark.parametrize("key", ["files", "val_files"])
def test_a_glob_that_matches_nothing_is_an_error_that_names_it(tmp_path: Path, key: str) -> None:
    file, missing = write(tmp_path / "a.txt", "a"), tmp_path / "*.nothing"
    with pytest.raises(UserError, match=rf"data\.{key}: no file matches .*\*\.nothing"):
        validation_documents(text_files(file, val_files=(missing,))) if key == "val_files" else documents(
            text_files(file, missing)
        )


def test_validation_files_are_documents_of_their_own(tmp_path: Path) -> None:
    config = text_files(write(tmp_path / "a.txt", "a"), val_files=(write(tmp_path / "v.txt", "v"),))
    own = validation_documents(config)
    assert own is not None
    assert (list(documents(config)), list(own)) == (["a"], ["v"])
    assert [file.name for file in source_files(config)] == ["a.txt", "v.txt"]


ROWS = [{"text": "first\n"}, {"other": 1, "text": "zwei 🙂"}, {"text": None}, {"text": ""}]
ROW_TEXTS = ["first\n", "zwei 🙂", ""]


@pytest.mark.parametrize("name", ["a.jsonl", "a[1].jsonl", "a.jsonl.gz", "a.parquet"])
def test_rows_are_documents(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    lines = "\n".join(map(json.dumps, ROWS)) + "\n\n"
    if name.endswith(".gz"):
        file.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), file)
    else:
        file.write_text(lines)
    assert list(documents(text_files(file))) == ROW_TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_missing_column_is_an_error_that_lists_those_there_are(tmp_path: Path, name: str) -> None:
    rows = [{"body": "x", "title": "y"}]
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        write(tmp_path / name, json.dumps(rows[0]))
    with pytest.raises(UserError, match=r"no column 'text': set data\.text_field to one of 'body', 'title'"):
        list(documents(text_files(tmp_path / name)))
    assert list(documents(text_files(tmp_path / name, text_field="body"))) == ["x"]


@pytest.mark.parametrize(
    "line",
    [b'{"text": nope}', b"[1]", '{"text": "é"}'.encode("latin1"), b'{"text": "cut'],
    ids=["no value", "no object", "latin-1", "cut off"],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes) -> None:
    file = write(tmp_path / "a.jsonl", b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: not JSON"):
        list(documents(text_files(file)))


@pytest.mark.parametrize("value", ["3", '"\\ud800"'], ids=["a number", "half a surrogate pair"])
def test_a_row_that_is_not_text_is_an_error(tmp_path: Path, value: str) -> None:
    file = write(tmp_path / "a.jsonl", f'{{"text": {value}}}')
    with pytest.raises(UserError, match=r"column 'text' holds .* not text"):
        list(documents(text_files(file)))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz"])
def test_a_broken_container_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=name):
        list(documents(text_files(write(tmp_path / name, "nonsense"))))


# ------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A folder that `datasets` takes for a dataset with two splits."""
    for split, texts in (("train", ["a", "b", "c"]), ("validation", ["v"])):
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": texts}), tmp_path / "data" / f"{split}.parquet")
    return tmp_path


def test_a_hub_dataset_gives_the_documents_of_its_splits(dataset: Path) -> None:
    config = hub(dataset, val_split="validation", max_documents=2)
    own = validation_documents(config)
    assert own is not None
    assert (list(documents(config)), list(own)) == (["a", "b"], ["v"])


def test_an_unknown_split_and_column_are_errors(dataset: Path) -> None:
    with pytest.raises(UserError, match=r"nope.*data=local_python"):
        list(documents(hub(dataset, split="nope")))
    with pytest.raises(UserError, match=r"set data\.text_field to one of 'text'"):
        list(documents(hub(dataset, text_field="page")))


def test_an_unreachable_hub_is_one_error_with_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"someone/something .*data=local_python or data=text_files"):
        list(documents(hub("someone/something")))


def test_the_network_is_tried_once_not_for_23_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise ConnectionError("name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", no_network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("retries for long"))
    with pytest.raises(UserError, match="name or service not known"):
        list(documents(hub("someone/something")))


def test_a_full_disk_is_not_taken_for_a_network_error(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpora, "_hub_rows", full)
    with pytest.raises(OSError, match="No space left"):
        list(documents(hub(dataset)))
