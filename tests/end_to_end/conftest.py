"""A folder of its own for every test's runs, and one finished run for all that only look at it."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Commands


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """One for all workers: kernels are compiled once."""
    mine = tmp_path_factory.getbasetemp()
    folder = (mine if worker_id == "master" else mine.parent) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def commands(tmp_path: Path, text_corpus: Path, cache: Path) -> Commands:
    return Commands(tmp_path, text_corpus, cache)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, text_corpus: Path, cache: Path) -> Commands:
    """A finished run in `run`, tracked by wandb offline."""
    made = Commands(tmp_path_factory.mktemp("finished"), text_corpus, cache)
    settings = ["optimizer.lr=1e-2", "stop.steps=120", "eval.every_tokens=7680", "hardware.peak_tflops.float32=null"]
    made.output = made.train("run_dir=run", "tracking.wandb=offline", *settings).stdout
    return made
