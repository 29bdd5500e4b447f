"""Kernels in C are compiled once where that can be, and otherwise a run says why it goes on without."""

from __future__ import annotations

import subprocess
import sys
import time
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
    with pytest.raises(
        UserError,
        match=r"cpu_kernels=compiled cannot be had: there is no C compiler .*; use cpu_kernels=torch, or auto",
    ):
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
        ("sys.exit('products.h:1: an unknown flag\\nand more')", r"failed: products.h:1: an unknown flag$|flag; use"),
        ("open(to, 'w').write('nonsense')", "could not be kept or loaded"),
        ("pass", "could not be kept or loaded .*: another folder for them is the environment's MOE_TRAIN_CACHE"),
        (
            "sys.stderr.buffer.write(b'in a file\\n\\xfcber: error\\nand more'); sys.exit(1)",
            "failed: \ufffdber: error;",
        ),
    ],
    ids=["refuses", "makes_nonsense", "makes_nothing", "refuses_in_another_encoding"],
)
def test_a_compiler_that_fails_is_said_in_a_line(compiler: Compiler, lines: str, reason: str) -> None:
    compiler(lines)
    said = library.use("auto", in_bf16=True)
    assert said is not None
    assert "\n" not in said
    with pytest.raises(UserError, match=reason):
        library.use("compiled", in_bf16=True)


@pytest.mark.parametrize("given", ["no_such_compiler -m64", "cc '", " "])
def test_a_compiler_that_is_none_is_named(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", given)
    with pytest.raises(UserError, match=f"the environment's CC={given} is no command"):
        library.use("compiled", in_bf16=True)


def test_a_compiler_that_hangs_is_ended_with_what_it_started(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = f"open({str(tmp_path / 'started')!r}, 'w').write(str(process.pid))"
    compiler(f"import subprocess\nprocess = subprocess.Popen(['sleep', '600'])\n{started}\nprocess.wait()")
    monkeypatch.setattr(library, "_SECONDS", 3.0)
    with pytest.raises(UserError, match="did not end within 3 s"):
        library.use("compiled", in_bf16=True)
    process = Path("/proc", (tmp_path / "started").read_text(), "cmdline")
    deadline = time.monotonic() + 60
    while process.exists() and process.read_bytes() and time.monotonic() < deadline:  # nothing is left of a zombie's
        time.sleep(0.05)
    assert not process.exists() or not process.read_bytes()


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


def test_one_that_was_cut_short_is_compiled_again(compiler: Compiler, tmp_path: Path) -> None:
    compiler(f"shutil.copy({torch._C.__file__!r}, to)")
    library.use("compiled", in_bf16=True)
    (kept,) = (tmp_path / "cache/kernels").iterdir()
    content = kept.read_bytes()
    kept.unlink()  # this process has it in memory
    kept.write_bytes(content[: len(content) // 2])
    library.use("compiled", in_bf16=True)
    assert kept.read_bytes() == content
    assert (tmp_path / "calls").read_text().count("compiled") == 2


def test_what_was_compiled_is_loaded_where_nothing_can_be_written(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(f"shutil.copy({torch._C.__file__!r}, to)")
    library.use("compiled", in_bf16=True)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(library.tempfile, "TemporaryDirectory", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    library.use("compiled", in_bf16=True)
    assert library.in_use() is not None


def test_torchs_openmp_is_found_in_a_folder_with_a_space(tmp_path: Path) -> None:
    """Asked of a process whose torch lies there."""
    ours = library._openmp_of_torch()
    if ours is None:
        pytest.skip("torch's OpenMP is not one that is found")
    spaced = tmp_path / "a folder"
    spaced.mkdir()
    (spaced / "libgomp.so.1").write_bytes(Path(ours._name).read_bytes())
    code = (
        "import ctypes, sys\nctypes.CDLL(sys.argv[1])\n"
        "from unittest import mock\nfrom moe_train.kernels.cpu import library\n"
        "library.torch = mock.Mock(__file__=sys.argv[1])\nprint(library._openmp_of_torch()._name)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(spaced / "libgomp.so.1")], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == str(spaced / "libgomp.so.1")
