"""Run folders that no training made, for checks of what reads them: as a run would leave them, with losses as given.

`changed` spoils the summary the way a bug would: other text, other tokens, another price.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moe_train.claims.plan import Arm, PlannedRun
from moe_train.claims.results import Folder
from moe_train.config import RunConfig, to_dict
from moe_train.cost.attempt import FINISHED, Attempt, as_dict

PRICE = 0.1  # dollars an hour
ROWS = 12


def write_run(
    arm: Arm,
    run: PlannedRun,
    folder: Folder,
    loss: float,
    *,
    tokens_per_second: float = 10_000.0,
    changed: Mapping[str, Any] | None = None,
    trained: RunConfig | None = None,
    order: Sequence[int] | None = None,
) -> Path:
    """`trained`: the configuration it was really made with; `order`: tokens seen at its logged steps."""
    path = folder.runs.of(run.hash)
    path.mkdir(parents=True, exist_ok=True)
    config = trained or run.config
    batch = run.config.batch_size * run.config.data.sequence_length
    steps = -(-run.tokens // batch)
    tokens = steps * batch
    seconds = tokens / tokens_per_second
    usd = seconds * PRICE / 3600
    summary: dict[str, Any] = {
        "status": FINISHED,
        "steps": steps,
        "tokens": tokens,
        **{key: round(value) for key, value in arm.figures.items()},
        "flops_per_token": arm.flops_per_token,
        "train_seconds": seconds,
        "wall_seconds": seconds + 10,
        "val_loss": loss,
        "val_bits_per_byte": loss / 0.6931,
        "val_tokens": 4096,
        "val_complete": True,
        "final_max_violation": 0.1,
        "usd_train": usd,
        "usd_total": usd,
        "cost_basis": "rental",
        "price_usd_per_hour": PRICE,
        "price_source": "made up",
        "price_date": None,
        "hardware": "cpu",
        "device_name": "made up",
        "num_devices": 1,
        "num_threads": 1,
        "compute_dtype": "float32",
        "corpus": config.data.name,
        "corpus_fingerprint": "0" * 32,
        "config_hash": config.config_hash(),
        "seed": config.seed,
        "versions": {"moe_train": "0", "torch": "0"},
        **(changed or {}),
    }
    logged = sorted({max(1, round(steps * part / ROWS)) for part in range(1, ROWS + 1)})
    seen = order or [step * batch for step in logged]
    rows = [
        {
            "step": step,
            "train/loss": loss + 2 * (1 - step / steps),
            "progress/tokens": at,
            "progress/flops": at * arm.flops_per_token,
            "throughput/step_seconds": seconds / steps,
            "cost/usd_train": usd * step / steps,
            "moe/max_violation": 0.1,
        }
        for step, at in zip(logged, seen)
    ]
    rows[-1]["val/loss"] = summary["val_loss"]
    (path / "checkpoints" / f"step_{steps}").mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(yaml.safe_dump({**to_dict(config), "config_hash": config.config_hash()}))
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    attempt = Attempt(run=str(path), status=FINISHED, usd=usd, wall_seconds=seconds, price_usd_per_hour=PRICE)
    (path / "ledger.json").write_text(json.dumps({"attempts": [as_dict(attempt)]}))
    return path
