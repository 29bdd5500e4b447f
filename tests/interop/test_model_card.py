"""The model card says what the run recorded, and that the rest was not recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from moe_train.interop.export import export_run

AsRun = Callable[..., Path]


@pytest.fixture
def card(as_run: AsRun, tmp_path: Path) -> Callable[..., str]:
    def make(**summary: object) -> str:
        run = as_run()
        if summary:
            (run / "summary.json").write_text(json.dumps(summary))
        export_run(run, tmp_path / "hf")
        return (tmp_path / "hf/README.md").read_text()

    return make


def row(text: str, key: str) -> str:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {key} |"))
    return line.split("|")[2].strip()


def test_what_is_not_known_is_said_to_be_so(card: Callable[..., str]) -> None:
    text = card()
    assert row(text, "validation loss, nats a token") == "not recorded"
    assert row(text, "device") == "not recorded"
    assert row(text, "corpus") == "not recorded"  # nothing was trained here
    assert "made for a test" in text
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "transformers"


def test_figures_are_those_of_the_summary_if_it_is_of_this_checkpoint(card: Callable[..., str]) -> None:
    known = {"val_loss": 1.25, "usd_total": 0.0125, "num_devices": 2, "device_name": "Some | GPU", "energy_kwh": None}
    text = card(steps=0, **known)
    assert row(text, "validation loss, nats a token") == "1.2500"
    assert "| device | 2 × Some \\| GPU |" in text
    assert "0.0125" in text
    assert row(text, "energy, kWh") == "not recorded"


def test_figures_of_other_weights_are_left_out(card: Callable[..., str]) -> None:
    text = card(steps=7, val_loss=1.25)
    assert row(text, "validation loss, nats a token") == "not recorded"
    assert "no summary of this very checkpoint" in text
