"""What a benchmark leaves: device, threads, versions, ceilings and figures, and how a file takes up new ones.

A file holds one device. Figures are replaced by those of the same suite of the same thing (`of`: model, tokens, format,
settings); all others stay. Each is from the run that lists its suite and what it is of (date, command, versions,
ceilings).
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import filelock
import torch
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from moe_train.benchmark.ceilings import Ceilings
from moe_train.benchmark.figures import Figure
from moe_train.cli import write_json
from moe_train.compose import CONFIGS
from moe_train.errors import UserError
from moe_train.training.runtime import Runtime
from moe_train.versions import versions_with

RESULTS = CONFIGS.parent / "docs" / "results"

_LIBRARIES = ("torch", "accelerate", "transformers", "numpy")

Content = dict[str, Any]
Key = tuple[str, str]  # a suite, and what its figures are of


def content_of(
    runtime: Runtime, suite: str, ceilings: tuple[Ceilings, Ceilings], figures: Sequence[Figure], load: float | None
) -> Content:
    """`ceilings`: before and after the suite. `load`: processes that wanted a core before anything was measured; None
    where the system does not say."""
    versions = versions_with(*(name for name in _LIBRARIES if find_spec(name) is not None))
    kernels, reason = cpu_kernels(runtime)
    common = {
        "num_threads": runtime.num_threads,
        "cpu_kernels": kernels,
        "cpu_kernels_reason": reason,
        "versions": versions,
        "date": date.today().isoformat(),
    }
    made = {
        "suites": [suite],
        "of": {suite: list(dict.fromkeys(figure.of for figure in figures))},
        "command": " ".join(["python scripts/benchmark.py", *sys.argv[1:]]),
        **common,
        "load_before": load,
        "ceilings": asdict(ceilings[0]),
        "ceilings_after": asdict(ceilings[1]),
    }
    return {
        "device": runtime.device_name,
        **common,
        "spread": "quartiles of the repetitions, which take turns; of ratios within each round",
        "runs": [made],
        "figures": [asdict(figure) for figure in figures],
    }


def cpu_kernels(runtime: Runtime) -> tuple[str | None, str | None]:
    """Whose kernels a CPU runs, "compiled" (ours, in C) or "torch", and why not ours. None on a GPU."""
    if runtime.cpu_kernels != "torch":
        return runtime.cpu_kernels, None
    if runtime.dtype is not torch.bfloat16:
        return "torch", "those in C multiply in BF16, and this does not"
    noted = [note for note in runtime.notes if note.startswith("cpu_kernels=auto")]
    return "torch", noted[0].partition(": ")[2] if noted else "cpu_kernels=torch asks for them"


def merged(earlier: Content | None, new: Content) -> Content:
    """`new`, and of `earlier` what `new` has not measured; what could not be measured now replaces nothing that was."""
    if earlier is None:
        return new
    had = _keys(earlier["figures"], measured=True)
    again = _keys(new["figures"], measured=True) | (_keys(new["figures"]) - had)
    left = _keys(earlier["figures"]) - again
    runs = [_only(made, left, earlier["figures"]) for made in earlier["runs"]]
    runs += [_only(made, again, new["figures"]) for made in new["runs"]]
    figures = [figure for figure in earlier["figures"] if _key(figure) in left]
    figures += [figure for figure in new["figures"] if _key(figure) in again]
    return earlier | new | {"runs": [made for made in runs if made["suites"]], "figures": figures}


def _key(figure: Content) -> Key:
    return figure["suite"], figure["of"]


def _keys(figures: Iterable[Content], measured: bool = False) -> set[Key]:
    return {_key(figure) for figure in figures if not measured or figure["value"] is not None}


def _only(made: Content, wanted: set[Key], figures: Sequence[Content]) -> Content:
    """A run with what is `wanted` of it. Older ones do not say what they are of: all figures of their suites."""
    whole = {suite: list(dict.fromkeys(f["of"] for f in figures if f["suite"] == suite)) for suite in made["suites"]}
    of = {suite: [each for each in ofs if (suite, each) in wanted] for suite, ofs in made.get("of", whole).items()}
    of = {suite: ofs for suite, ofs in of.items() if ofs}
    return made | {"suites": list(of), "of": of}


def results_file(runtime: Runtime) -> Path:
    """Where `save=true` keeps the results of a device; a CPU's by its threads too."""
    name = re.sub(r"[^a-z0-9]+", "_", runtime.device_name.lower()).strip("_") or runtime.device_type
    if runtime.device_type == "cpu":
        name += f"_{runtime.num_threads}_threads"
    return RESULTS / f"{name}.json"


def check_file(path: Path, device: str) -> None:
    """Raise UserError where new results of `device` could not be kept in `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written ({error.strerror}): use json=FILE, not save=true") from None
    read(path, device)


def save(path: Path, new: Content) -> None:
    """Take `new` up into the file as it is now: others may have added to it. Raises UserError."""
    with filelock.FileLock(path.with_name(f".{path.name}.lock")):
        write_json(path, merged(read(path, new["device"]), new))


_OF_A_FILE = ConfigDict(strict=True)  # further keys may be there, and stay


@dataclass(config=_OF_A_FILE)
class _Made:
    suites: list[str]
    of: dict[str, list[str]] | None = None


@dataclass(config=_OF_A_FILE)
class _Found:
    suite: str
    name: str
    value: float | None
    unit: str
    of: str


@dataclass(config=_OF_A_FILE)
class _File:
    device: str
    runs: list[_Made]
    figures: list[_Found]


def read(path: Path, device: str) -> Content | None:
    """Earlier results of `device`; None if there are none. Raises UserError where the file is something else."""
    if not path.exists():
        return None
    try:
        text = path.read_text()
        TypeAdapter(_File).validate_json(text)
        content: Content = json.loads(text)
    except (ValueError, RecursionError, OSError):  # pydantic's too are ValueErrors
        raise UserError(f"{path} holds no results of a benchmark: move it away, or correct it") from None
    if content["device"] != device:
        raise UserError(f"{path} is of {content['device']}, not of {device}: move it away, or use json=FILE")
    return content
