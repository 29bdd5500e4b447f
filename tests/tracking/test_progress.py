"""What is shown while a run goes on: a panel on a terminal, lines elsewhere, and what is left of time and money."""

import io
import sys
import textwrap

import pytest
from command_line import ROOT
from rich.console import Console
from terminal import Terminal

from moe_train.tracking.panel import Panel, curve
from moe_train.tracking.progress import Lines

ROW = {
    "train/loss": 2.5,
    "throughput/tokens_per_second": 1234.0,
    "throughput/model_flops_utilization": 0.194,
    "moe/max_violation": 0.5,
    "moe/layer_0/max_violation": 0.0,
    "moe/layer_1/max_violation": 0.5,
    "moe/dead_experts": 3.0,
}


def console(terminal: bool = False, width: int = 160) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width)


def row(loss: float | None = 2.5, rate: float | None = 1234.0) -> dict[str, float | None]:
    return {"train/loss": loss, "throughput/tokens_per_second": rate}


# --------------------------------------------------------------------------------------------------------- lines


def test_off_a_terminal_progress_is_a_line_every_five_seconds_and_the_last_step():
    out, now = console(), [0.0]
    with Lines(out, clock=lambda: now[0]) as progress:
        for step in range(1, 21):
            now[0] = 1.0 * step
            progress.update(step / 20, step=step, row=row(4 - step / 10), usd=0.001 * step, usd_ahead=lambda s: s)
    lines = out.file.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["1", "6", "11", "16", "20"]
    assert lines[2] == " 55%  step 11  loss 2.9000  1,234 tokens/s  $0.011  9.0 s left"


def test_time_left_counts_from_where_a_resumed_run_started_and_what_is_not_known_is_said():
    out, now = console(), [100.0]
    with Lines(out, clock=lambda: now[0]) as progress:
        progress.update(0.8, step=80, row=row(1.0, 1.0), usd=None, usd_ahead=lambda s: s)
        now[0] = 110.0
        progress.update(0.9, step=90, row=row(None, None), usd=None, usd_ahead=lambda s: s)
    assert out.file.getvalue().splitlines() == [
        " 80%  step 80  loss 1.0000  1 tokens/s  cost not known",
        " 90%  step 90  loss not known  tokens/s not known  cost not known  10.0 s left",
    ]


# ---------------------------------------------------------------------------------------------- what a panel says


def drawn(progress: Panel, width: int = 100) -> list[str]:
    """The panel's lines without its frame, as they would be drawn now."""
    out = console(width=width)
    out.print(progress._render())
    return [line.strip("│╭╮╰╯─ ") for line in out.file.getvalue().splitlines()]


def test_a_panel_shows_loss_speed_utilisation_cost_forecast_and_load():
    now = [0.0]
    panel = Panel("nano", console(terminal=True), clock=lambda: now[0])
    panel.update(0.25, step=10, row={**ROW, "train/loss": 3.5, "val/loss": 3.0, "val/bits_per_byte": 1.5}, usd=0.01,
                 usd_ahead=lambda s: 0.001 * s)  # fmt: skip
    now[0] = 10.0
    panel.update(0.5, step=20, row=ROW, usd=0.02, usd_ahead=lambda s: 0.001 * s)
    now[0] = 14.0  # the clock goes on between logged steps
    title, _bar, how_far, *figures, _ = drawn(panel)
    assert title == "nano"
    assert how_far == "50%  step 20  14.0 s so far  16.0 s left"
    assert dict(line.split("  ", 1) for line in figures if line) == {
        "loss": "       2.5000  █▁",
        "validation": " 3.0000, 1.5000 bits per byte",  # of an earlier row
        "tokens/s": "   1,234",
        "utilisation": "19.4%",
        "cost": "       $0.02 so far, $0.04 at the end",
        "expert load": "fullest 1.50 × mean  ▁▅ by layer, 3 dead",
    }


def test_a_panel_of_a_dense_run_without_price_and_peak_makes_nothing_up():
    panel = Panel("dense", console(terminal=True))
    unknown = {"train/loss": 2.5, "throughput/tokens_per_second": 1.0, "throughput/model_flops_utilization": None}
    panel.update(0.1, step=1, row=unknown, usd=None, usd_ahead=lambda s: 0.0)
    text = "\n".join(drawn(panel))
    assert text.count("not known") == 2
    assert "expert" not in text
    assert "at the end" not in text
    assert "left" not in text


def test_a_panel_of_several_processes_shows_what_they_exchange_and_how_long_it_is_waited_for():
    panel = Panel("nano", console(terminal=True))
    exchanged = {"comm/bytes": 6_692_744.0, "comm/exposed_fraction": 0.079}
    panel.update(0.1, step=1, row=ROW | exchanged, usd=0.01, usd_ahead=lambda s: 0.0)
    assert "exchanged    6.69 MB a step, 7.9% of the time waited for" in drawn(panel)


def test_after_the_last_step_a_panel_foretells_nothing():
    now = [0.0]
    panel = Panel("nano", console(terminal=True), clock=lambda: now[0])
    for now[0], fraction in ((0.0, 0.5), (5.0, 1.0)):
        panel.update(fraction, step=1, row=ROW, usd=0.01, usd_ahead=lambda s: 1.0)
    assert "at the end" not in "\n".join(drawn(panel))


@pytest.mark.parametrize("width", [24, 40, 79])
def test_a_narrow_terminal_loses_no_figure(width):
    now = [0.0]
    panel = Panel("a_run_with_a_very_long_name_" * 4, console(terminal=True, width=width), clock=lambda: now[0])
    for now[0], fraction in ((0.0, 0.5), (5.0, 0.75)):
        panel.update(fraction, step=1234, row=ROW, usd=0.01, usd_ahead=lambda s: 0.002 * s)
    out = console(width=width)
    out.print(panel._render())
    lines = out.file.getvalue().splitlines()
    assert all(len(line) <= width - 2 for line in lines)  # ^C has room beside it
    text = " ".join(" ".join(drawn(panel, width)).replace("│", " ").split())
    for figure in ("step 1,234", "2.5000", "1,234", "19.4%", "$0.01", "at the", "1.50"):
        assert figure in text


def test_a_curve_is_of_means_from_lowest_to_highest():
    assert curve([]) == ""
    assert curve([5.0]) == "▁"
    assert curve([1.0, 2.0, 3.0]) == "▁▅█"
    assert curve([0.0, 2.0, 2.0, 4.0], width=2) == "▁█"
    assert len(curve([float(n) for n in range(1000)])) == 24


# -------------------------------------------------------------------------------------------------- on a terminal

_SHOW = textwrap.dedent(
    """
    import logging, os, sys, time, warnings
    handler = logging.StreamHandler()  # a library's, which took hold of stderr when it was imported
    logging.getLogger("library").addHandler(handler)
    from moe_train.tracking.console import print_notes
    from moe_train.tracking.progress import open_progress

    def run(choice, body=lambda: None):
        display = open_progress(choice, "a run")
        print("kind", type(display).__name__)
        if display is None:
            return
        with display:
            for step in (1, 2, 3):
                display.update(step / 4, step=step, row={"train/loss": 1.0 * step}, usd=1.0, usd_ahead=lambda s: s)
                time.sleep(0.6)
            body()

    def talk():
        print_notes(["a note"])
        sys.stderr.write("warning: of ours\\n")
        warnings.warn("warning of a library")
        logging.getLogger("library").warning("logged by a library")
        print("said on stdout")
        time.sleep(0.6)

    def fail():
        raise ValueError("something broke")
    """
)


def on_a_terminal(tmp_path, script, environment=None, shell=False, **options) -> Terminal:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8", **(environment or {})}
    command = [sys.executable, "-c", _SHOW + script]
    if shell:  # which outlives it
        command = ["sh", "-c", '"$@"; echo; echo the shell goes on', "sh", *command]
    return Terminal(command, tmp_path, environment, **options)


def test_notes_warnings_and_output_stand_above_one_panel(tmp_path):
    with on_a_terminal(tmp_path, "run('auto', talk)") as terminal:
        assert terminal.wait() == 0
        text = terminal.text()
        assert terminal.is_in_order()
    said = ("note: a note", "warning: of ours", "warning of a library", "logged by a library", "said on stdout")
    assert all(text.count(line) == 1 for line in said), text
    assert text.count("╭") == text.count("╰") == 1
    assert max(text.index(line) for line in said) < text.index("╭")
    assert "75%  step 3" in text
    assert text.rstrip().endswith("╯")


def test_an_error_stands_below_the_panel_whole_and_the_terminal_is_in_order(tmp_path):
    with on_a_terminal(tmp_path, "run('auto', fail)") as terminal:
        assert terminal.wait() == 1
        text = terminal.text()
        assert terminal.is_in_order()
    assert text.count("╭") == 1
    assert text.index("╯") < text.index("Traceback")
    assert "ValueError: something broke" in text


def test_a_killed_run_leaves_the_cursor_and_the_modes_as_they_were(tmp_path):
    with on_a_terminal(tmp_path, "run('auto', lambda: os.kill(os.getpid(), 9))", shell=True) as terminal:
        terminal.wait()
        assert "step 3" in terminal.text()
        assert "the shell goes on" in terminal.text()
        assert terminal.is_in_order()


def test_output_that_goes_to_a_file_stays_there(tmp_path):
    with (tmp_path / "out").open("wb") as out, on_a_terminal(tmp_path, "run('auto', talk)", stdout=out.fileno()) as t:
        assert t.wait() == 0
        assert "said on stdout" not in t.text()
    assert (tmp_path / "out").read_text() == "kind Panel\nsaid on stdout\n"


@pytest.mark.parametrize(
    ("choice", "terminal", "kind"),
    [
        ("auto", "xterm", "Panel"),
        ("panel", "xterm", "Panel"),
        ("lines", "xterm", "Lines"),
        ("none", "xterm", "NoneType"),
        ("auto", "dumb", "Lines"),
    ],
)
def test_what_is_shown_on_a_terminal_can_be_chosen(tmp_path, choice, terminal, kind):
    with on_a_terminal(tmp_path, f"run({choice!r})", {"TERM": terminal}) as started:
        assert started.wait() == 0
        text = started.text()
    assert f"kind {kind}" in text
    assert ("╭" in text) == (kind == "Panel")
    assert ("step 1  loss 1.0000" in text) == (kind == "Lines")
