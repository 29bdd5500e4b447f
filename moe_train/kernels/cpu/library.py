"""The kernels compiled for this processor, once, and whether a process uses them.

A step of `tiny` on two cores takes two thirds of the time it takes with torch's operations: torch multiplies an
expert's rows in 87 µs and what lies between two products goes through memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

import platformdirs
import torch
from torch import Tensor

from moe_train.errors import UserError
from moe_train.precision.cpu_threads import on_cores

PANEL, REGISTER = 64, 16  # columns that are packed together, FP32 numbers of a register (products.h)

Choice = Literal["auto", "compiled", "torch"]

_HERE = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-fPIC", "-shared")
_LIBRARIES = ("-lm",)
_COMPILERS = ("cc", "gcc", "clang")
_SECONDS = 120.0  # of compiling, which takes seven

_library: ctypes.CDLL | None = None
_openmp: ctypes.CDLL | None = None  # torch's


def use(choice: Choice, in_bf16: bool) -> str | None:
    """Decide for this process, whose products are on a CPU. Returns what was decided, where there was a choice.

    Raises UserError where `choice` is "compiled" and it cannot be.
    """
    global _library, _openmp
    _library = None
    if choice == "torch":
        return None
    missing = _missing(in_bf16)
    if missing is None:
        try:
            _library, _openmp = _loaded(_compiler()), _openmp_of_torch()
        except UserError as error:
            missing = str(error)
        else:
            return f"cpu_kernels={choice} took the project's own, compiled for this processor"
    if choice == "compiled":
        raise UserError(f"cpu_kernels=compiled cannot be had: {missing}; use cpu_kernels=torch, or auto")
    return f"cpu_kernels=auto took torch's operations, which are slower: {missing}" if in_bf16 else None


def in_use() -> ctypes.CDLL | None:
    return _library


def up(n: int, to: int) -> int:
    """n, or the next multiple of `to`."""
    return -(-n // to) * to


def call(name: str, *arguments: int | Tensor) -> None:
    """A kernel of one core. Raises MemoryError."""
    as_c = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else ctypes.c_int64(x) for x in arguments]
    if getattr(_library, name)(*as_c):
        raise MemoryError(f"{name}: no memory")


def parts(rows: int) -> int:
    """That rows are cut in where sums over them are added up in the end: the same on any number of cores."""
    return min(16, max(8, rows // 1024))


def call_on_cores(name: str, arguments: ctypes.Structure) -> None:
    """A kernel whose cores take their work from a common count, `next`, and note beside it where memory is missing.

    On the threads that torch's operations run on, if torch's OpenMP can be found: they are awake. Raises MemoryError.
    """
    function, cores = getattr(_library, name), torch.get_num_threads()
    count = (ctypes.c_int64 * 2)()
    arguments.next = ctypes.addressof(count)
    place = ctypes.byref(arguments)
    if cores == 1:
        function(place)
    elif _openmp is not None:
        _openmp.GOMP_parallel(function, place, cores, 0)
    else:
        on_cores(lambda _: function(place), range(cores))
    if count[1]:
        raise MemoryError(f"{name}: no memory for its packed operands")


def _missing(in_bf16: bool) -> str | None:
    if not in_bf16:
        return "they multiply in BF16, and this run does not"
    if not getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():  # a probe of torch's own, not public
        return "the processor has no AVX512-BF16"
    return None


def _compiler() -> list[str]:
    """Its command. Raises UserError."""
    if given := os.environ.get("CC"):
        try:
            command = shlex.split(given)
        except ValueError:  # a quotation without an end
            command = []
        if not command or shutil.which(command[0]) is None:
            raise UserError(f"the environment's CC={given} is no command")
        return command
    for name in _COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise UserError(f"there is no C compiler ({', '.join(_COMPILERS)})")


def _loaded(compiler: list[str]) -> ctypes.CDLL:
    """Compiled unless it was before, by the same compiler for the same processor. Raises UserError."""
    sources = sorted(_HERE.glob("*.[ch]"))
    made_of = [" ".join([*compiler, *_FLAGS, *_LIBRARIES]), _run([*compiler, "--version"]), _processor()]
    content = [*(each.encode() for each in made_of), *(source.read_bytes() for source in sources)]
    name = f"{hashlib.sha256(b'|'.join(content)).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("MOE_TRAIN_CACHE") or platformdirs.user_cache_dir("moe_train")) / "kernels"
    try:
        if not _is_whole(folder / name):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as made:
                new = Path(made, name)
                _run([*compiler, *_FLAGS, "-o", str(new), *(str(s) for s in sources if s.suffix == ".c"), *_LIBRARIES])
                new.write_bytes(_sealed(new.read_bytes()))
                os.replace(new, folder / name)
        return ctypes.CDLL(str(folder / name))
    except OSError as error:
        remedy = "another folder for them is the environment's MOE_TRAIN_CACHE"
        raise UserError(f"the compiled kernels could not be kept or loaded ({error}): {remedy}") from None


def _sealed(library: bytes) -> bytes:
    """With its hash behind it, where loaders do not look."""
    return library + hashlib.sha256(library).digest()


def _is_whole(kept: Path) -> bool:
    """Whether it is there as it was written: one that ends too soon would kill the process that loads it."""
    try:
        content = kept.read_bytes()
    except FileNotFoundError:
        return False
    return content == _sealed(content[: -hashlib.sha256().digest_size])


def _openmp_of_torch() -> ctypes.CDLL | None:
    """The library whose threads torch uses, among those that are loaded; GNU's, or another with its entry."""
    try:
        maps = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
        loaded = {line.split(maxsplit=5)[5] for line in maps if "/" in line}  # a path may have spaces
        named = sorted(path for path in loaded if Path(path).name.startswith(("libgomp", "libiomp", "libomp")))
        ours = [path for path in named if path.startswith(str(Path(torch.__file__).parent))] or named
        library = ctypes.CDLL(ours[0]) if len(ours) == 1 else None  # with several, which of them is torch's is a guess
    except OSError:
        return None
    return library if library is not None and hasattr(library, "GOMP_parallel") else None


def _run(command: list[str]) -> str:
    """What it says, if it succeeds in time. Raises UserError."""
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, errors="replace", start_new_session=True
        )
    except OSError as error:
        raise UserError(f"{command[0]} failed: {error}") from None
    with process:
        try:
            said, complaint = process.communicate(timeout=_SECONDS)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started holds on to the pipes
            if isinstance(error, subprocess.TimeoutExpired):
                raise UserError(f"{command[0]} did not end within {_SECONDS:g} s") from None
            raise
    if process.returncode:
        lines = complaint.strip().splitlines() or ["without a word"]
        raise UserError(f"{command[0]} failed: {next((each for each in lines if 'error' in each), lines[0])}")
    return said


def _processor() -> str:
    """What -march=native depends on."""
    try:
        flags = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")][:1]
    except OSError:
        flags = []
    return "|".join([platform.machine(), platform.processor(), *flags])
