"""The end of a sweep: what became of every job, where it lies and what it came to, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_train.errors import UserError
from moe_train.sweeps.runs import RunsByHash
from moe_train.tracking.console import as_usd

RESULTS = ("val_bits_per_byte", "val_loss")


def figures(runs: RunsByHash, run_hash: str) -> dict[str, Any]:
    """Where a run lies and what it came to; None for what is not known."""
    summary = runs.summary(run_hash) or {}
    folder, log = runs.of(run_hash), runs.log(run_hash)
    try:
        usd = runs.spent(run_hash) if folder.exists() else None
    except UserError:
        usd = None
    return {
        "folder": str(folder) if folder.exists() else None,
        "log": str(log) if log.exists() else None,
        **{key: summary.get(key) for key in RESULTS},
        "usd_total": usd,
    }


def show(lines: Sequence[dict[str, Any]], stopped: str | None, runs: Path) -> None:
    """The table on stdout, and what went wrong on stderr, where nobody pipes it away."""
    table = Table(title="runs", title_justify="left")
    table.add_column("job", overflow="fold")
    table.add_column("status", overflow="fold")
    for name in ("bits/byte", "dollars"):
        table.add_column(name, justify="right")
    table.add_column("run", no_wrap=True)
    for line in lines:
        status = line["status"] if line["status"] != "failed" else f"exit status {line['exit_status']}"
        bits, usd = line.get("val_bits_per_byte"), line.get("usd_total")
        known = ("" if bits is None else f"{bits:.4f}", "" if usd is None else as_usd(usd))
        table.add_row(Text(line["job"]), status, *known, line["hash"] or "")
    out = Console()
    out.print(table)
    out.print(
        f"in {_short(runs)}: RUN is its folder, RUN.log what it said", soft_wrap=True, markup=False, highlight=False
    )
    console = Console(stderr=True)
    failed = [line for line in lines if line["status"] == "failed"]
    left = [line for line in lines if line["status"] == "not started"]
    if failed:
        console.print(Text(f"{len(failed)} of {len(lines)} jobs failed:"), soft_wrap=True)
    for line in failed:
        log = f" ({line['log']})" if line.get("log") else ""
        console.print(Text(f"  exit status {line['exit_status']}: {line['job']}: {line['says']}{log}"), soft_wrap=True)
    if stopped is not None:
        console.print(Text(f"{stopped}: {len(left)} of {len(lines)} not started"), soft_wrap=True)


def write(path: Path, lines: Sequence[dict[str, Any]], stopped: str | None, sweep: str) -> None:
    """The same as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"sweep": sweep, "stopped": stopped, "jobs": list(lines)}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
