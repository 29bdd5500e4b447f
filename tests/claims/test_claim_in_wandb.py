"""What wandb is told of a claim, from the reports that are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.claims.wandb_report import figures

KEPT = sorted((Path(__file__).resolve().parents[2] / "docs/results/claims").glob("*.json"))


@pytest.mark.parametrize("report", KEPT, ids=lambda path: path.stem)
def test_every_comparison_of_a_claim_is_told(report: Path) -> None:
    for entry in json.loads(report.read_text())["claims"]:
        told = figures(entry)
        assert told["verdict"] == entry["verdict"]
        for nth, each in enumerate(entry["comparisons"], start=1):
            of = f"{nth}_{each['measure']}/{each['arm']}_against_{each['against']}"
            assert told[f"{of}/effect"] == each["effect"]
            assert [told[f"{of}/interval_low"], told[f"{of}/interval_high"]] == (each["interval"] or [None, None])
