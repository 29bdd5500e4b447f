"""What a benchmark leaves: device, threads, versions, ceilings and figures, and how a file takes up new ones.

A file holds one device. Suites that are measured again replace what the file had of them; all others stay, each with
the run it is from (date, command, versions, ceilings).
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from moe_train.benchmark.ceilings import Ceilings
from moe_train.benchmark.figures import Figure
from moe_train.compose import CONFIGS
from moe_train.errors import UserError
from moe_train.training.runtime import Runtime
from moe_train.versions import versions_with

RESULTS = CONFIGS.parent / "docs" / "results"

_LIBRARIES = ("torch", "accelerate", "transformers", "numpy")

Content = dict[str, Any]


def content_of(
    runtime: Runtime, suites: Sequence[str], ceilings: Ceilings, figures: Sequence[Figure], load: float | None
) -> Content:
    """`load`: processes that wanted a core before anything was measured; None where the system does not say."""
    versions = versions_with(*_LIBRARIES)
    common = {"num_threads": runtime.num_threads, "versions": versions, "date": date.today().isoformat()}
    made = {
        "suites": list(suites),
        "command": " ".join(["python scripts/benchmark.py", *sys.argv[1:]]),
        **common,
        "load_before": load,
        "ceilings": asdict(ceilings),
    }
    return {
        "device": runtime.device_name,
        **common,
        "spread": "quartiles of the repetitions, which take turns; of ratios within each round",
        "runs": [made],
        "figures": [asdict(figure) for figure in figures],
    }


def load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def merged(earlier: Content, new: Content) -> Content:
    """`new`, and of `earlier` the suites that `new` has not. Raises UserError where it is of another device."""
    if earlier["device"] != new["device"]:
        raise UserError(f"these results are of {earlier['device']}, not of {new['device']}: give another file")
    again = {suite for made in new["runs"] for suite in made["suites"]}
    runs = [made | {"suites": [suite for suite in made["suites"] if suite not in again]} for made in earlier["runs"]]
    kept = [figure for figure in earlier["figures"] if figure["suite"] not in again]
    return new | {"runs": [made for made in runs if made["suites"]] + new["runs"], "figures": kept + new["figures"]}


def results_file(runtime: Runtime) -> Path:
    """Where `save=true` keeps the results of a device; a CPU's by its threads too."""
    name = re.sub(r"[^a-z0-9]+", "_", runtime.device_name.lower()).strip("_") or runtime.device_type
    if runtime.device_type == "cpu":
        name += f"_{runtime.num_threads}_threads"
    return RESULTS / f"{name}.json"


def read(path: Path) -> Content | None:
    """Earlier results; None if there are none. Raises UserError where the file is something else."""
    if not path.exists():
        return None
    try:
        content: Content = json.loads(path.read_text())
        for key in ("device", "runs", "figures"):
            _ = content[key]
        return content
    except (ValueError, KeyError, TypeError, OSError):
        raise UserError(f"{path} holds no results of a benchmark: move it away, or correct it") from None
