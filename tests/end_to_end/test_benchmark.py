"""The benchmark command: the promised figures of its short suite, and one line for what it cannot do."""

from __future__ import annotations

import json
import math
import signal
import sys
import time

import pytest
from command_line import ROOT, Commands
from small_model import SMALL

SCRIPT = ["python", str(ROOT / "scripts/benchmark.py")]
TINY = [
    *(*SMALL, "model.intermediate_size=44", "data.vocab_size=320", "data.sequence_length=16"),
    *("model=nano", "precision=fp32", "num_threads=1"),
]
MAY_BE_NEGATIVE = ("optimizer_fraction", "experts_8_to_256_slowdown", "experts_8_to_256_slowdown_forward_backward")


def test_the_short_suite_has_every_figure_that_one_process_can_measure(commands: Commands) -> None:
    printed = commands.run(*SCRIPT, "suite=smoke", *TINY, "json=found.json").stdout
    content = json.loads((commands.folder / "found.json").read_text())
    assert {"device", "num_threads", "versions", "figures"} <= set(content)
    assert content["num_threads"] == 1
    found = {figure["name"] for figure in content["figures"]}
    promised = {"moe_tax", "peer_speedup", "utilization_of_measured_peak", "experts_8_to_256_slowdown"}
    assert found >= promised | {"peak_memory_ratio", "fp8_speedup"}
    for figure in content["figures"]:
        assert figure["suite"] == "smoke"
        assert figure["name"].replace("_", " ")[:20] in printed
        if figure["value"] is None:
            assert figure["note"], figure
            continue
        assert math.isfinite(figure["value"]), figure
        assert figure["value"] >= 0 or figure["name"] in MAY_BE_NEGATIVE, figure
        if figure["spread"] is not None:
            low, high = figure["spread"]
            assert low <= figure["value"] <= high, figure
    assert "note" in {figure["name"]: figure for figure in content["figures"]}["peer_tokens_per_second_compiled"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["suite=speed"], "suite=speed is unknown: choose from step, peer"),
        (["suite=tax", "model=llama_3_1_8b", "num_threads=1"], "model=llama_3_1_8b has no experts"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_one_line(arguments: list[str], message: str, commands: Commands) -> None:
    result = commands.run(*SCRIPT, *arguments, check=False)
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr


def test_sigterm_ends_it_and_the_run_it_made_in_one_line_and_keeps_what_was_measured(commands: Commands) -> None:
    (commands.folder / "temporary").mkdir()
    commands.environment["TMPDIR"] = str(commands.folder / "temporary")
    commands.environment["TORCHINDUCTOR_CACHE_DIR"] = str(commands.folder / "torchs")  # which it makes on import
    asked = ["suite=tax,startup", "rounds=3", "json=found.json", *TINY]
    process = commands.start([sys.executable, str(ROOT / "scripts/benchmark.py"), *asked])
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("measuring suite=startup"):
            break
    while not list((commands.folder / "temporary").glob("*/*.txt")):  # what a run of the real command says
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, "interrupted by SIGTERM: tax kept in found.json\n")
    assert {f["suite"] for f in json.loads((commands.folder / "found.json").read_text())["figures"]} == {"tax"}
    assert not list((commands.folder / "temporary").iterdir())
