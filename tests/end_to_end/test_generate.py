"""scripts/generate.py on finished runs: what it says, what it writes, and what it refuses."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, Commands


@pytest.fixture(scope="session")
def with_mtp(tmp_path_factory: pytest.TempPathFactory, text_corpus: Path, cache: Path) -> Commands:
    """A finished run with two MTP modules in `run`."""
    made = Commands(tmp_path_factory.mktemp("with_mtp"), text_corpus, cache)
    made.train("model/mtp=depth_2", "optimizer.lr=2e-2", "batch_size=8", "stop.steps=160", "run_dir=run")
    return made


def generated(commands: Commands, tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """What `json=` holds and what stood on stderr."""
    file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    command = ["python", str(ROOT / "scripts/generate.py"), "run=run", "prompt=the quick ", "max_new_tokens=40"]
    result = commands.run(*command, f"json={file}", *arguments)
    content: dict[str, Any] = json.loads(file.read_text())
    assert result.stdout == content["text"] + "\n"
    return content, result.stderr


def test_it_reports_the_cache_of_the_published_formula(finished: Commands, tmp_path: Path) -> None:
    content, said = generated(finished, tmp_path, "temperature=0")
    # 2 layers × keys and values × 2 key-value heads × 32 features (gqa_4x32), all but the last token read, FP32.
    assert content["cache_elements_per_token"] == 2 * 2 * 2 * 32
    read = len("the quick ") + content["new_tokens"] - 1
    assert content["cache_bytes"] in (read * 256 * 4, (read + 1) * 256 * 4)  # one more if a text ended
    assert f"{content['new_tokens']} tokens" in said
    assert "in float32 (cpu, num_threads=1); cache" in said  # as many threads as the run had
    assert "256 elements a token" in said


def test_speculative_decoding_gives_the_same_text_in_fewer_passes_and_says_how_much_faster(
    with_mtp: Commands, tmp_path: Path
) -> None:
    plain, _ = generated(with_mtp, tmp_path, "temperature=0")
    content, said = generated(with_mtp, tmp_path, "temperature=0", "speculative=true", "compare=true")
    assert content["text"] == plain["text"]
    assert content["same_text"] is True
    assert content["forward_passes"] < plain["forward_passes"]
    assert 0 < content["acceptance"] <= 1
    assert len(content["acceptance_per_depth"]) == 2
    assert content["speed_up"] == pytest.approx(
        content["tokens_per_second"] / content["greedy_tokens_per_second"], rel=1e-9
    )
    assert f"{content['speed_up']:.2f} times as fast" in said
    assert f"{content['acceptance']:.0%} of the drafts accepted" in said


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["speculative=true"], 2, "temperature=0.8 draws tokens: add temperature=0"),
        (["compare=true"], 2, "add speculative=true"),
        (["speculative=true", "temperature=0"], 1, "model/mtp=depth_1"),
        (["speculative=maybe"], 2, "speculative=maybe"),
        (["num_threads=10000"], 1, "num_threads=10000 is more than the"),
    ],
)
def test_what_cannot_be_drafted_is_refused_in_one_line(
    finished: Commands,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", f"run={finished.folder}/run", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts/generate.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (status, 1), said
    assert message in said
