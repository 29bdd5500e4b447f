"""Kernels in C are compiled once where that can be, and otherwise a run says why it goes on without."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moe_train.errors import UserError
from moe_train.kernels.cpu import library

Compiler = Callable[[str], None]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor that has what they need, and an empty cache."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setenv("MOE_TRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    yield
    monkeypatch.undo()
    library.use("torch", in_bf16=True)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """A compiler that does what the lines of Python say, and counts in `calls` what it compiles."""

    def make(lines: str) -> None:
        calls = tmp_path / "calls"
        calls.touch()
        script = tmp_path / "compiler.py"
        script.write_text(
            "import shutil, sys\n"
            "if '--version' in sys.argv: print('one of my own'); sys.exit(0)\n"
            f"open({str(calls)!r}, 'a').write('compiled\\n')\n"
            "to = sys.argv[sys.argv.index('-o') + 1]\n" + lines
        )
        monkeypatch.setenv("CC", f"{sys.executable} {script}")

    return make


def test_without_a_compiler_auto_says_so_and_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    said = library.use("auto", in_bf16=True)
    assert said == "cpu_kernels=auto took torch's operations, which are slower: there is no C compiler (cc, gcc, clang)"
    assert library.in_use() is None
    with pytest.raises(UserError, match=r"cpu_kernels=compiled cannot be had: there is no C compiler .*; leave it out"):
        library.use("compiled", in_bf16=True)


def test_what_has_no_use_for_them_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.use("auto", in_bf16=False) is None
    assert library.use("torch", in_bf16=True) is None
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert "the processor has no AVX512-BF16" in (library.use("auto", in_bf16=True) or "")
    with pytest.raises(UserError, match="they multiply in BF16, and this run does not"):
        library.use("compiled", in_bf16=False)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("sys.exit('products.h:1: an unknown flag\\nand more')", r"failed: products.h:1: an unknown flag$|flag; leave"),
        ("open(to, 'w').write('nonsense')", "could not be kept or loaded"),
        ("pass", "could not be kept or loaded"),
    ],
    ids=["refuses", "makes_nonsense", "makes_nothing"],
)
def test_a_compiler_that_fails_is_said_in_a_line(compiler: Compiler, lines: str, reason: str) -> None:
    compiler(lines)
    said = library.use("auto", in_bf16=True)
    assert said is not None
    assert "\n" not in said
    with pytest.raises(UserError, match=reason):
        library.use("compiled", in_bf16=True)


def test_a_compiler_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no_such_compiler -m64")
    with pytest.raises(UserError, match="the environment's CC=no_such_compiler -m64 is no command"):
        library.use("compiled", in_bf16=True)


def test_it_is_compiled_once(compiler: Compiler, tmp_path: Path) -> None:
    any_library = torch._C.__file__
    compiler(f"shutil.copy({any_library!r}, to)")
    with ThreadPoolExecutor(4) as pool:  # as processes that start together
        list(pool.map(lambda _: library.use("compiled", in_bf16=True), range(4)))
    begun = (tmp_path / "calls").read_text().count("compiled")
    assert 1 <= begun <= 4
    library.use("compiled", in_bf16=True)
    assert (tmp_path / "calls").read_text().count("compiled") == begun
    assert len(list((tmp_path / "cache/kernels").iterdir())) == 1
