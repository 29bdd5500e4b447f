"""The claims command on real runs: a suite that is killed goes on, and what it reports leads to its runs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time

import pytest
import yaml
from command_line import ROOT, Commands

SCRIPT = [sys.executable, str(ROOT / "scripts/reproduce.py")]


@pytest.fixture
def own(commands: Commands) -> Commands:
    """With a claim about one arm, so that two runs are enough."""
    base = [o for o in commands.tiny if not o.startswith(("stop", "tracking", "num_threads"))]
    claim = {
        "statement": "A tiny model ends below 3 nats.",
        "source": "nowhere",
        "published": "nothing",
        "base": base,
        "arms": {"tiny": {"overrides": []}},
        "varies": [],
        "comparisons": [
            {"arm": "tiny", "against": None, "measure": "val_loss", "test": {"kind": "below", "margin": 3.0}},
            {"arm": "tiny", "against": None, "measure": "max_violation", "test": {"kind": "above", "margin": 0.0}},
        ],
        "sigma": 0.1,
        "scales": {"smoke": {"overrides": [], "tokens": [5120], "seeds": 2}},
        "carries_over": "Nothing.",
        "does_not_carry_over": "All of it.",
    }
    whole = "model.moe.moe_intermediate_size=48"  # experts as wide as the dense FFN
    upcycling = claim | {
        "arms": {
            "dense": {"overrides": ["model.moe=null"], "seed_offset": 10},
            "upcycled": {"overrides": [whole], "starts_from": "dense"},
        },
        "comparisons": [
            {"arm": "upcycled", "against": None, "measure": "val_loss", "test": {"kind": "below", "margin": 3.0}}
        ],
    }
    (commands.folder / "own/claim").mkdir(parents=True)
    for name, content in {"tiny": claim, "up": upcycling}.items():
        (commands.folder / f"own/claim/{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return commands


def test_an_arm_goes_on_from_another_arms_run(own: Commands) -> None:
    own.run(*SCRIPT, "claim=up", "scale=smoke", "--config-dir", "own", "tracking=none", "num_threads=1", "json=up.json")
    (claim,) = json.loads((own.folder / "up.json").read_text())["claims"]
    assert (claim["runs"], claim["reasons"]) == (4, [])
    first = {}
    for run in claim["run_list"]:
        rows = (own.folder / "outputs/claims" / run["folder"] / "metrics.jsonl").read_text().splitlines()
        first[run["arm"], run["seed"]] = json.loads(rows[0])["train/loss"]
        last = json.loads(rows[-1])["train/loss"]
        if run["arm"] == "upcycled":  # it begins where the dense model ended, not where that began
            assert first["upcycled", run["seed"]] < first["dense", run["seed"] + 10] - 0.3
        assert last < first[run["arm"], run["seed"]] + 0.1


def test_a_killed_suite_goes_on_and_is_judged(own: Commands) -> None:
    command = [*SCRIPT, "claim=tiny", "scale=smoke", "--config-dir", "own", "tracking.wandb=offline", "num_threads=1"]
    suite = own.start(command)
    runs = own.folder / "outputs/claims/runs"
    deadline = time.monotonic() + 120
    while not list(runs.glob("*/ledger.json")):
        assert suite.poll() is None, suite.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    suite.send_signal(signal.SIGKILL)
    suite.communicate()
    (killed,) = runs.glob("*/ledger.json")
    (first,) = json.loads(killed.read_text())["attempts"]
    job = json.loads(killed.parent.with_suffix(".json").read_text())["pid"]
    with contextlib.suppress(ProcessLookupError):  # it outlives its suite
        os.kill(job, signal.SIGKILL)
    shutil.rmtree(killed.parent / "checkpoints", ignore_errors=True)  # another machine got the small files alone
    own.run(*command, "json=found.json")
    content = json.loads((own.folder / "found.json").read_text())
    (claim,) = content["claims"]
    assert (claim["claim"], claim["scale"], claim["runs"], claim["reasons"]) == ("tiny", "smoke", 2, [])
    assert claim["verdict"] in ("supported", "refuted", "inconclusive")
    assert claim["interval"][0] <= claim["effect"] <= claim["interval"][1]
    attempts = json.loads(killed.read_text())["attempts"]
    assert len(attempts) == 2
    assert attempts[0]["id"] == first["id"]
    (usd,) = (run["usd"] for run in claim["run_list"] if run["hash"] == killed.parent.name)
    assert usd == pytest.approx(sum(attempt["usd"] for attempt in attempts))
    assert attempts[0]["usd"] > 0
    for run in claim["run_list"]:
        folder = own.folder / "outputs/claims" / run["folder"]
        assert json.loads((folder / "summary.json").read_text())["val_loss"] == run["val_loss"]
        assert list(folder.glob("wandb/offline-run-*"))
    lines = [json.loads(line) for line in (own.folder / "outputs/ledger.jsonl").read_text().splitlines()]
    assert {line["claim"] for line in lines} == {"tiny"}
    assert list((own.folder / "outputs/claims/verdicts").glob("tiny-smoke/wandb/offline-run-*"))
    assert "<svg" in (own.folder / "outputs/claims/report.html").read_text()
