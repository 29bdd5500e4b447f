"""Which folders are runs: those at or below what a glob names, whole or half-written."""

from __future__ import annotations

import glob
import os
from pathlib import Path

CONFIG, METRICS, SUMMARY, ACCOUNT = "config.yaml", "metrics.jsonl", "summary.json", "ledger.json"


def find_run_folders(pattern: str) -> list[Path]:
    """Every run folder that `pattern` matches or that lies below a match, sorted.

    A folder is a run's if it has metrics, a summary or an account, so that one cut short is found too. Nothing is
    looked for inside a run folder (wandb keeps a config.yaml of its own there), and links to folders are not followed.
    """
    start = pattern.rstrip("/")
    while start.endswith("/**") or start == "**":
        start = start[:-2].rstrip("/") or ("/" if start.startswith("/") else ".")
    # A folder whose name has brackets in it is meant as it stands.
    matches = [start] if os.path.isdir(start) else glob.glob(start, recursive=True)
    found: set[Path] = set()
    for match in matches:
        for folder, below, files in os.walk(match):
            if {METRICS, SUMMARY, ACCOUNT} & set(files):
                found.add(Path(folder).absolute())
                below.clear()
            of_claims = ("verdicts",) if "registered" in below else ()  # whose summaries are no runs'
            below[:] = [name for name in below if name not in ("checkpoints", "wandb", "__pycache__", *of_claims)]
    return sorted(found)
