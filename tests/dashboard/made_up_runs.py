"""Run folders as `train.py` leaves them, written in milliseconds instead of trained for minutes."""

from __future__ import annotations

import json
import math
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # compiled where it can be: five hundred take a second
START = datetime(2026, 11, 20, tzinfo=UTC)


def write_run(
    folder: Path,
    *,
    steps: int = 40,
    seed: int = 0,
    precision: str = "bf16",
    num_experts: int | None = 16,
    lr: float = 1e-3,
    price: float | None = 0.05,
    tokens_per_second: float = 1000.0,
    final_loss: float = 2.0,
    noise: float = 0.0,
    layers: int = 3,
    name: str = "nano",
    sweep: str | None = None,
    status: str = "finished",
    hardware: str = "cpu",
    settings: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    ledger: Path | None = None,
) -> Path:
    """A run whose loss falls as 1/√step to `final_loss` plus `noise`; one that is `running` has no summary."""
    folder.mkdir(parents=True, exist_ok=True)
    noisy = random.Random(seed)
    moe = None if num_experts is None else {"num_experts": num_experts, "top_k": 4}
    config = {
        "model": {"name": name, "hidden_size": 128, "moe": moe},
        "data": {"name": "local_python", "tokenizer": "bytes"},
        "precision": {"name": precision, "fp8": None},
        "optimizer": {"kind": "muon", "lr": lr, "betas": [0.9, 0.95]},
        "cost": {"sweep": sweep},
        "name": name,
        "run_dir": str(folder),
        "seed": seed,
        "num_threads": 2,
        **(settings or {}),
        "config_hash": f"{seed:012x}",
    }
    (folder / "config.yaml").write_text(yaml.dump(config, Dumper=_DUMPER, sort_keys=False))
    rows = []
    for step in range(1, steps + 1):
        tokens = step * 1000
        seconds = tokens / tokens_per_second
        loss = final_loss + 3 * (step**-0.5 - steps**-0.5) + noise * noisy.gauss(0, 1)
        row: dict[str, Any] = {
            "step": step,
            "train/loss": loss,
            "progress/tokens": tokens,
            "progress/flops": tokens * 2.5e6,
            "progress/seconds": seconds,
            "cost/usd_total": None if price is None else seconds / 3600 * price,
            "cost/usd_train": None if price is None else seconds / 3600 * price,
            "cost/usd_per_million_tokens": None if price is None else 1e6 / tokens_per_second / 3600 * price,
            "throughput/tokens_per_second": tokens_per_second,
            "throughput/model_flops_utilization": 0.1,
        }
        for layer in range(layers if moe else 0):
            row[f"moe/layer_{layer}/max_violation"] = (layer + 1) / step
            row[f"moe/layer_{layer}/load_entropy"] = 1 - 0.1 * (layer + 1) / step
            row[f"moe/layer_{layer}/dead_experts"] = 0.0
        if step % max(1, steps // 4) == 0 or step == steps:
            row |= {"val/loss": loss + 0.1, "val/bits_per_byte": (loss + 0.1) / math.log(2)}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    last, seconds = rows[-1], steps * 1000 / tokens_per_second
    usd = None if price is None else seconds / 3600 * price
    attempt = {
        "run": str(folder),
        "sweep": sweep,
        "hardware": hardware,
        "status": status,
        "wall_seconds": seconds,
        "train_seconds": seconds,
        "tokens": steps * 1000,
        "price_usd_per_hour": price,
        "usd": usd,
        "started_at": (START + timedelta(hours=seed)).isoformat(),
        "updated_at": datetime.now(UTC).isoformat()
        if status == "running"
        else (START + timedelta(hours=seed, seconds=seconds)).isoformat(),
        "id": str(folder),
    }
    (folder / "ledger.json").write_text(json.dumps({"attempts": [attempt]}))
    if ledger is not None:
        with ledger.open("a") as file:
            file.write(json.dumps(attempt) + "\n")
    if status != "running":
        content = {
            "status": status,
            "steps": steps,
            "tokens": steps * 1000,
            "total_params": 700_000,
            "active_params": 400_000,
            "flops_per_token": 2.5e6,
            "train_seconds": seconds,
            "wall_seconds": seconds,
            "tokens_per_second": tokens_per_second,
            "model_flops_utilization": 0.1,
            "final_train_loss": last["train/loss"],
            "val_loss": last["val/loss"],
            "val_bits_per_byte": last["val/bits_per_byte"],
            "usd_train": usd,
            "usd_total": usd,
            "usd_per_million_tokens": last["cost/usd_per_million_tokens"],
            "usd_per_million_tokens_all_in": last["cost/usd_per_million_tokens"],
            "price_usd_per_hour": price,
            "price_source": None if price is None else "made up",
            "cost_basis": "rental",
            "energy_kwh": None,
            "hardware": hardware,
            "device_name": "made up",
            "num_devices": 1,
            "num_threads": 2,
            "precision": precision,
            "compute_dtype": "bfloat16",
            "corpus": "local_python",
            "corpus_fingerprint": "f" * 32,
            "seed": seed,
            **(summary or {}),
        }
        (folder / "summary.json").write_text(json.dumps(content))
    return folder
