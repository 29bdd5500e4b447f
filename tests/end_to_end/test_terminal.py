"""A run watched on a terminal: the panel while it trains, Ctrl-C, and what is left on the screen."""

from __future__ import annotations

import re

import pytest
from command_line import Commands
from terminal import Terminal


def test_a_run_on_a_terminal_shows_a_panel_and_ctrl_c_ends_it_in_order(commands: Commands) -> None:
    command = commands.train_command("run_dir=run", "stop.steps=100000", "eval.every_tokens=2000")
    with Terminal(command, commands.folder, commands.environment) as terminal:
        text = terminal.shows(lambda text: bool(re.search(r"step \d\d.*left", text)) and "bits per byte" in text)
        for figure in ("loss", "tokens/s", "utilisation", "so far, ", "at the end", "fullest", "by layer"):
            assert figure in text, figure
        terminal.type(b"\x03")
        assert terminal.wait() == 130
        text = terminal.text()
        assert terminal.is_in_order()
    assert text.count("╭") == 1, text
    assert "interrupted by SIGINT after step" in text
    saved = int((re.search(r"interrupted by SIGINT after step (\d+), which is saved", text) or [0, 0])[1])
    assert (commands.folder / f"run/checkpoints/step_{saved}").is_dir()
    assert commands.metrics("run")[-1]["step"] == saved


def test_a_panel_where_there_is_no_terminal_is_refused_before_anything_is_made(commands: Commands) -> None:
    result = commands.train("run_dir=run", "tracking.console=panel", check=False)
    assert result.returncode == 1
    assert "tracking.console=panel needs a terminal, and stderr is none: choose auto or lines" in result.stderr
    assert not (commands.folder / "run").exists()


@pytest.mark.parametrize(("choice", "lines"), [("none", False), ("lines", True)])
def test_off_a_terminal_progress_is_lines_or_nothing(commands: Commands, choice: str, lines: bool) -> None:
    result = commands.train("run_dir=run", f"tracking.console={choice}", "stop.steps=2")
    assert ("100%  step 2  loss " in result.stderr) == lines
    assert "run folder" in result.stderr
    assert "bits per byte" in result.stdout


@pytest.mark.xdist_group("finished")
def test_wandbs_terminal_view_draws_the_curves_of_an_offline_run(finished: Commands) -> None:
    (folder,) = (finished.folder / "run/wandb").glob("offline-run-*")
    environment = {**finished.environment, "WANDB_ERROR_REPORTING": "false", "HOME": str(finished.folder)}
    with Terminal(["wandb", "leet", str(folder)], finished.folder, environment, columns=140, lines=50) as terminal:
        text = terminal.shows(lambda text: "State: Finished" in text and "cost/usd_total" in text)
        assert "cost/usd_per_million" in text
        terminal.type(b"q")
        assert terminal.wait() == 0
