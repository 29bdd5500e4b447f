"""What the claims command refuses before anything is made."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT
from made_up_claims import HERE

from moe_train.claims import suite
from moe_train.errors import UserError

spec = importlib.util.spec_from_file_location("reproduce_script", ROOT / "scripts" / "reproduce.py")
assert spec is not None
assert spec.loader is not None
script = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = script  # pydantic looks up its types there
spec.loader.exec_module(script)

OWN = ["claim=mine", "scale=smoke", "--config-dir", "own"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "claim= and scale= are needed"),
        (["claim=all"], "claim= and scale= are needed"),
        (["claim=mine", "scale=huge"], "scale=huge: choose one of smoke, cpu, gpu"),
        (["claim=mine", "--config-dir", "own"], "claim= and scale= are needed"),
        (["claim=mne", "scale=smoke", "--config-dir", "own"], "there is no claim=mne: did you mean mine?"),
        ([*OWN, "budget.usd=-1"], "budget.usd=-1: give a number above 0"),
        ([*OWN, "budget.usd=1", "cost.ledger=null"], "budget.usd=1 is kept with the ledger"),
        ([*OWN, "jobs=0"], "jobs=0: give a number of at least 1"),
        ([*OWN, "model=nano"], "report=, and of train.py's settings tracking, hardware, cost"),
        ([*OWN, "hardware=rtx_4090"], "hardware=rtx_4090 is a GPU, and there is none: leave it out"),
        (
            [*OWN, "dry_run=true", "hardware=h100", "hardware.memory_gb=3"],
            "hardware.memory_gb=3: of a GPU one does not have only the price",
        ),
        ([*OWN, "readme=README.md"], "readme= writes the table of reports that are there: leave claim="),
        ([*OWN, "data.tokens=3"], "claim=mine scale=smoke, arm one: unknown key data.tokens"),
        ([*OWN, "dry_run=true", "hardware=abacus"], "there is no hardware=abacus: choose one of"),
        ([*OWN, "json=nowhere/x.json"], "there is no folder"),
        ([*OWN, "data=text_files", "data.files=[no/*.txt]"], "data.files: no file matches 'no/*.txt'"),
        ([*OWN, "data=text_files", "data.files=[no/*.txt]", "dry_run=true"], "data.files: no file matches 'no/*.txt'"),
        (["readme=README.md", "report=,"], "report=, names none"),
        (["readme=README.md", "report=missing.json"], "there is no report missing.json"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_one_line(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    claim_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    claim_dir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    monkeypatch.setattr(suite, "device_here", lambda _: HERE)
    with pytest.raises(UserError) as error:
        script.main()
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "outputs").exists()


def test_an_incomplete_suite_ends_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*_: Any) -> dict[str, Any]:
        return {"claims": [], "complete": False}

    monkeypatch.setattr(script, "_suite", found)
    monkeypatch.setattr(sys, "argv", ["reproduce.py"])
    with pytest.raises(SystemExit, match="1"):
        script.main()
