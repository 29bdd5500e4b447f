"""The real commands, run as processes on a text and a model small enough for seconds."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from warm_start import Forks

ROOT = Path(__file__).resolve().parents[1]

# A model of 20K parameters on the made-up corpus, in FP32, every step logged.
TINY = [
    "data=text_files",
    "data.tokenizer=bytes",
    "data.sequence_length=32",
    "batch_size=4",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.intermediate_size=48",
    "model/attention=gqa_4x32",
    "model.moe.num_experts=8",
    "model.moe.top_k=2",
    "model.moe.moe_intermediate_size=16",
    "optimizer=adamw",
    "precision=fp32",
    "num_threads=1",
    "hardware.peak_tflops.float32=0.1",  # else every run measures it for half a second
    "tracking=none",
    "tracking.log_every_steps=1",
    "eval.max_tokens=2000",
    "stop.steps=6",
]

Command = Callable[..., subprocess.CompletedProcess[str]]

_forks: list[Forks] = []  # of this worker, once it is needed


class Commands:
    """Commands of the README in a folder of their own, without an account and with a cache of their own."""

    def __init__(self, folder: Path, corpus: Path, cache: Path) -> None:
        self.folder = folder
        self.tiny = [*TINY, f"data.files=[{corpus}/*.jsonl]"]
        self.output = ""  # of the run that made this folder, where there is one
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "PYTEST"))}
        self.environment |= {"MOE_TRAIN_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        a_script = command[0] in ("python", sys.executable) and command[1].endswith(".py")
        result = self._forked(command) if a_script else self._run(command)
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result

    def _run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, text=True, capture_output=True, timeout=300, check=False
        )

    def _forked(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        if not _forks:
            _forks.append(Forks({k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "PYTEST"))}))
            atexit.register(_forks[0].close)
        with tempfile.TemporaryDirectory() as folder:
            files = Path(folder, "stdout"), Path(folder, "stderr")
            status = _forks[0].run(list(command[1:]), self.folder, self.environment, files)
            return subprocess.CompletedProcess(command, status, *(file.read_text() for file in files))

    def train(self, *overrides: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`python train.py` on the tiny settings."""
        return self.run(*self.train_command(*overrides), check=check)

    def train_command(self, *overrides: str) -> list[str]:
        return [sys.executable, str(ROOT / "train.py"), *self.tiny, *overrides]

    def summary(self, run_dir: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / run_dir / "summary.json").read_text())
        return content

    def metrics(self, run_dir: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / run_dir / "metrics.jsonl").read_text().splitlines()]
