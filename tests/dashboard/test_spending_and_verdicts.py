"""What was spent is the ledger's total, and verdicts are those of the report; neither has to be there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from made_up_runs import write_run

from moe_train.claims.record import digest
from moe_train.cost.bill import make_bill
from moe_train.cost.shared_ledger import read_ledger
from moe_train.dashboard.content import Source
from moe_train.dashboard.spending import MAX_SWEEPS
from moe_train.dashboard.verdicts import verdicts

ROOT = Path(__file__).parents[2]


def spending_of(folder: Path) -> dict:
    return Source(f"{folder}/**", folder / "ledger.jsonl", folder / "report.json").read()["spending"]


def test_totals_are_those_of_the_ledger_and_lines_end_at_them(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    for index in range(6):
        status = "failed" if index == 5 else "finished"
        write_run(tmp_path / f"{index}", seed=index, sweep=("a", "b", None)[index % 3], ledger=ledger, status=status)
    ledger.write_text(ledger.read_text() + '{"cut short\n')
    spent = spending_of(tmp_path)
    bill = make_bill(read_ledger(ledger)[0], "sweep")
    assert spent["rows"][-1]["usd_total"] == bill.total.usd_total
    assert [row["group"] for row in spent["rows"]] == ["a", "b", "no sweep", "total"]
    assert spent["rows"][-1]["usd"]["unfinished"] > 0
    ends = {line["sweep"]: line["usd"][-1] for line in spent["lines"]}
    assert ends == pytest.approx({row["group"]: row["usd_total"] for row in spent["rows"][:-1]})
    for line in spent["lines"]:
        assert line["usd"] == sorted(line["usd"])
        assert line["at"] == sorted(line["at"])
    assert spent["notes"] == ["1 lines of the ledger cannot be read and are left out"]


def test_without_a_ledger_the_accounts_of_the_runs_are_added_up_and_it_is_said(tmp_path: Path) -> None:
    write_run(tmp_path / "one", price=1.0)
    write_run(tmp_path / "two", price=None)
    spent = spending_of(tmp_path)
    assert spent["rows"][-1]["attempts"] == 2
    assert spent["rows"][-1]["usd_total"] == pytest.approx(40 / 3600)
    assert "there is no ledger ledger.jsonl" in spent["notes"][0]
    assert "1 attempts had no price" in spent["notes"][1]


def test_attempts_that_the_ledger_does_not_have_are_counted(tmp_path: Path) -> None:
    write_run(tmp_path / "one", ledger=tmp_path / "ledger.jsonl")
    write_run(tmp_path / "two")
    spent = spending_of(tmp_path)
    assert spent["rows"][-1]["attempts"] == 1
    assert spent["notes"] == ["1 attempts of the runs shown are not in this ledger, and not in its totals"]


def test_more_sweeps_than_can_be_told_apart_become_one_line(tmp_path: Path) -> None:
    for index in range(MAX_SWEEPS + 5):
        write_run(tmp_path / f"{index}", sweep=f"s{index}", price=1.0 + index, steps=4)
    lines = spending_of(tmp_path)["lines"]
    assert len(lines) == MAX_SWEEPS + 1
    assert lines[0]["sweep"] == f"s{MAX_SWEEPS + 4}"
    assert lines[-1]["sweep"] == "5 more sweeps"


PUBLISHED = sorted((ROOT / "docs/results/claims").glob("*_gpu.json"))


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_verdicts_are_taken_from_the_report_as_they_stand(file: Path) -> None:
    content = json.loads(file.read_text())
    found = verdicts(file)
    assert found["note"] is None
    for shown, claim in zip(found["claims"], content["claims"], strict=True):
        assert shown == {key: claim[key] for key in shown}
        assert {"claim", "scale", "verdict", "effect", "interval", "runs", "usd"} <= set(shown)


def test_a_report_that_was_edited_gives_no_verdict(tmp_path: Path) -> None:
    content = json.loads(PUBLISHED[0].read_text())
    content["claims"][0]["effect"] *= 2
    (tmp_path / "report.json").write_text(json.dumps(content))
    found = verdicts(tmp_path / "report.json")
    assert found["claims"] == []
    assert "is not as it was written" in found["note"]


def test_a_figure_that_is_no_number_to_json_is_not_known(tmp_path: Path) -> None:
    content = json.loads(PUBLISHED[0].read_text())
    claim = content["claims"][0]
    claim |= {"effect": math.nan, "interval": [-math.inf, math.inf]}
    claim["digest"] = digest(claim)
    (tmp_path / "report.json").write_text(json.dumps(content))
    (found,) = verdicts(tmp_path / "report.json")["claims"]
    assert (found["effect"], found["interval"]) == (None, [None, None])


NO_REPORTS = [None, "", "[]", '{"claims": 3}', '{"claims": [3]}', '{"claims": [{"claim": 1}]}', "[" * 100_000]


@pytest.mark.parametrize("text", NO_REPORTS, ids=lambda text: text and text[:30])
def test_a_report_that_is_missing_or_none_leaves_a_note(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    found = verdicts(tmp_path / "report.json")
    assert found["claims"] == []
    assert ("there is no report.json" if text is None else "is no report of claims") in found["note"]
