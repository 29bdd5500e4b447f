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


# Layout and number of processes of the checkpoints that are passed round.
WORLDS = {4: ("hybrid", "ep", "ep_fsdp2"), 2: ("ddp", "fsdp2", "ep"), 1: ("single",)}
_READ_ALL = ("ep_fsdp2", "fsdp2", "single")
PASSED_ON = ["optimizer=muon", "optimizer.lr=1e-2", "model/mtp=depth_1", "micro_batch_size=null"]
LOSSES = [
    "model/mtp=depth_1",
    "model.moe.sequence_loss_weight=0.01",
    "model.moe.router_z_loss_weight=0.001",
    "z_loss_weight=1e-4",
    "optimizer.max_grad_norm=0.5",
]
# A step has two micro-batches on two processes, one on four.
TWENTY = ("twenty", [*LOSSES, "optimizer=adamw", "optimizer.lr=1e-2", "batch_size=4"], {"steps": 20, "double": True})
MUON = ("muon", [*LOSSES, "optimizer=muon", "optimizer.lr=1e-2"], {})
CROWDED = ("crowded", ["optimizer=adamw", "activation_checkpointing=true"], {"double": True, "crowded": True})
FP8 = ("fp8", ["optimizer=adamw", "optimizer.lr=1e-3", "precision=fp8_deepseek", "precision.backend=emulated"], {})
ROUNDED = ["optimizer=adamw", "optimizer.lr=1e-3"]  # on their way to experts
TO_FP8 = "parallel.dispatch_format=fp8"
IN_FP8 = ["precision=fp8_deepseek", "precision.backend=emulated"]
FEW = ("few", ["optimizer=muon", "model.moe.num_experts=2", "model.moe.top_k=1"], {})  # experts, for four processes
BF16 = ("bf16", [*LOSSES, "optimizer=adamw", "optimizer.lr=1e-3", "precision=bf16"], {})
BF16_MOMENTS = ("moments", ["optimizer=muon", "optimizer.moments=bfloat16", "optimizer.stochastic_rounding=true"], {})


def case(name: str, layout: str, *overrides: str, steps: int = 3, **more: Any) -> dict[str, Any]:
    where = [f"parallel={layout}", *LAYOUTS.get(layout, [])]
    return {"name": name, "overrides": [*SHAPE, *where, *overrides], "steps": steps, **more}


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


def cases(layouts: tuple[str, ...], *kinds: tuple[str, list[str], dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        case(f"{name}/{layout}", layout, *overrides, **more) for name, overrides, more in kinds for layout in layouts
    ]


def written(folder: Path, processes: int) -> list[dict[str, Any]]:
    """Four steps, with a checkpoint in their middle."""
    return [
        case(f"{name}", layout, *PASSED_ON, steps=4, save_at=2, save=str(folder / name))
        for layout in WORLDS[processes]
        for name in [f"{layout}{processes}"]
    ]


def read(folder: Path, processes: int, sources: tuple[int, ...]) -> list[dict[str, Any]]:
    """The other two of the four, from what each of the worlds `sources` has written; some read only a few."""
    return [
        case(
            f"{source}{there} to {layout}{processes}",
            layout,
            *PASSED_ON,
            steps=4,
            load=str(folder / f"{source}{there}"),
        )
        for layout in WORLDS[processes]
        for there in sources
        for source in WORLDS[there]
        if layout in _READ_ALL or f"{source}{there}" in (f"{layout}{processes}", "ep_fsdp24", "single1")
    ]


def rounded(*overrides: str, **more: Any) -> list[tuple[str, list[str], dict[str, Any]]]:
    """What goes towards experts in FP8; in double precision, with experts without tokens, in BF16 and in FP8."""
    return [
        ("rounded", [*ROUNDED, *overrides], {"double": True, **more}),
        ("rounded crowded", [*ROUNDED, *overrides], {"double": True, "crowded": True, **more}),
        ("rounded bf16", [*ROUNDED, "precision=bf16", *overrides], more),
        ("rounded fp8", [*ROUNDED, *IN_FP8, *overrides], more),
    ]


def run_all(folder: Path) -> Results:
    """Everything the tests look at; starting processes takes longest, so each start does all it can."""
    layouts = tuple(LAYOUTS)
    capacity = ("switch", ["model/moe=switch", "model.moe.top_k=1", "optimizer=adamw"], {"double": True})
    four = cases(("ep_fsdp2",), TWENTY) + cases(layouts, MUON) + cases(("ep", "ep_fsdp2"), CROWDED)
    four += (
        cases(("fsdp2", "ep_fsdp2"), FP8, BF16_MOMENTS, FEW)
        + cases(("ddp", "ep_fsdp2"), BF16)
        + cases(("ep_fsdp2",), ("bf16 wide", BF16[1], {"wide": True}))
        + cases(("ddp", "ep", "ep_fsdp2"), capacity)
    )
    four += cases(("ep",), *rounded(TO_FP8)[:2]) + cases(("ep_fsdp2",), *rounded(TO_FP8)[1:])
    uncounted = ("uncounted", MUON[1], {"uncounted": True})
    four += cases(("ddp", "ep_fsdp2"), uncounted)
    by_hand = [case(f"collectives/{n}", "ddp", collectives=True) for n in (4, 2)]
    found = run(folder, four + written(folder, 4) + by_hand[:1], 4)
    watched = ("watched", [*ROUNDED, "micro_batch_size=4"], {"watched": True, "steps": 1})
    clipped = [*ROUNDED, "optimizer.max_grad_norm=0.1"]
    clips = cases(("ddp", "fsdp2"), ("clipped", clipped, {}), ("left to AdamW", clipped, {"left": True}))
    two = clips + cases(("ddp", "fsdp2", "ep"), TWENTY) + by_hand[1:] + cases(("ep", "ep_fsdp2"), watched)
    found |= run(folder, two + written(folder, 2) + read(folder, 2, (4, 2)), 2)
    alone = cases(("single",), TWENTY, MUON, CROWDED, FP8, BF16_MOMENTS, FEW, *rounded(rounded=True))
    alone = [each | {"overrides": [*each["overrides"], "micro_batch_size=4"]} for each in alone]
    found |= run(folder, alone + written(folder, 1) + read(folder, 1, (4, 2, 1)), 1)
    return found | run(folder, read(folder, 4, (4, 2, 1)), 4)
