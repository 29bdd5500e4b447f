"""Small models on several processes for tests: how cases are named and run (spread_worker.py says what they are)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import spread_worker
import torch
from small_model import SMALL

WORKER = Path(spread_worker.__file__)
SHAPE = [
    *SMALL,
    "model.num_hidden_layers=2",
    "model.vocab_size=64",
    "data.sequence_length=8",
    "batch_size=8",
    "micro_batch_size=1",
    "precision=fp32",
    "num_threads=1",
]
LAYOUTS = {
    "ddp": [],
    "fsdp2": [],
    "hybrid": ["parallel.shard=2"],
    "ep": ["parallel.expert_parallel=2"],
    "ep_fsdp2": ["parallel.expert_parallel=2"],
}


def case(name: str, layout: str, *overrides: str, steps: int = 3, **more: Any) -> dict[str, Any]:
    where = [f"parallel={layout}", *LAYOUTS.get(layout, [])]
    return {"name": f"{name}/{layout}", "overrides": [*SHAPE, *where, *overrides], "steps": steps, **more}


Results = dict[str, dict[str, Any]]


def run(folder: Path, wanted: list[dict[str, Any]], processes: int) -> Results:
    """What tests/parallel/spread_worker.py makes of the cases."""
    (folder / "cases.json").write_text(json.dumps(wanted))
    out = folder / f"{processes}.pt"
    start = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", str(processes)]
    command = [*(start if processes > 1 else [sys.executable]), str(WORKER), str(out), str(folder / "cases.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-8000:]
    results: Results = torch.load(out, weights_only=False)
    return results
