"""What a person is told of a run, and that nothing unknown is left out or made up."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from moe_train.tracking.console import closing_table, print_notes, where_to_look


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=160)


def text(console: Console) -> str:
    return console.file.getvalue()


SUMMARY = {
    "hardware": "h100",
    "num_threads": 4,
    "status": "finished",
    "steps": 366,
    "tokens": 1_500_000,
    "final_train_loss": 3.21,
    "final_max_violation": None,
    "final_dropped_fraction": None,
    "val_mtp_loss": None,
    "val_loss": 3.3456,
    "val_bits_per_byte": 1.2345,
    "tokens_per_second": 12345.6,
    "model_flops_utilization": 0.4321,
    "peak_source": "vendor data sheet, dense",
    "train_seconds": 723.4,
    "wall_seconds": 3661.0,
    "usd_train": 0.0123456,
    "usd_total": 1234.5,
    "usd_per_million_tokens": 0.00823,
    "usd_per_million_tokens_all_in": 0.5,
    "price_usd_per_hour": 2.69,
    "price_source": "RunPod",
    "price_date": "2026-03",
    "cost_basis": "rental",
    "usd_per_kwh": None,
    "energy_source": "NVML counter",
    "num_devices": 8,
    "energy_kwh": 0.25,
}


def rendered(summary: dict) -> dict[str, str]:
    """The closing table's rows by name, read from what is printed."""
    out = console()
    out.print(closing_table(summary))
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in text(out).splitlines() if "│" in line]
    return {cell[0]: cell[1] for cell in cells}


def test_the_closing_table_shows_what_an_arm_is_about_where_it_has_it():
    rows = rendered({**SUMMARY, "final_max_violation": 0.25, "final_dropped_fraction": 0.031, "val_mtp_loss": 4.5678})
    assert rows["expert load"] == "the fullest expert 1.25 times the mean, 3.1% dropped"
    assert rows["validation loss of MTP"] == "4.5678"
    plain = rendered(SUMMARY)
    assert "expert load" not in plain
    assert "validation loss of MTP" not in plain


def test_the_closing_table_shows_what_several_processes_exchanged_and_the_price_of_waiting_for_it():
    of_a_kind = {"exposed_seconds": 0.1, "hidden_seconds": 0.0}
    exchanged = {
        "communication_bytes_per_step": 1_234_567.0,
        "communication_by_kind": {
            "weights": {"bytes": 234_000.0, **of_a_kind},
            "whole_matrices": {"bytes": 1_000_000.0, **of_a_kind},
            "other": {"bytes": 567.0, **of_a_kind},
        },
        "communication_exposed_fraction": 0.125,
        "usd_communication": 0.0015432,
    }
    table = closing_table(SUMMARY | exchanged)
    out = Console(file=io.StringIO(), width=300)
    out.print(table)
    assert (
        "1.23 MB sent a step and process (whole matrices 1 MB, weights 234 KB, other 567 B), waited for 12.5% of a "
        "step: $0.00154"
    ) in " ".join(text(out).split())
    assert "communication" not in rendered(SUMMARY)


def test_the_closing_table_shows_results_and_both_costs_with_the_price_they_follow_from():
    assert rendered(SUMMARY) == {
        "train loss": "3.2100",
        "validation loss": "3.3456",
        "bits per byte": "1.2345",
        "tokens": "1,500,000",
        "tokens/s": "12,346",
        "model FLOPs utilisation": "43.2% of the peak (vendor data sheet, dense)",
        "time": "0:12:03 training, 1:01:01 in all",
        "cost": "$0.0123 training, $1,234.50 in all (8 × $2.69 an hour, RunPod, 2026-03)",
        "cost per million tokens": "$0.00823 training, $0.5 all-in",
        "energy": "0.25 kWh (NVML counter)",
    }


@pytest.mark.parametrize(
    "key",
    [
        "final_train_loss",
        "val_loss",
        "val_bits_per_byte",
        "tokens_per_second",
        "model_flops_utilization",
        "usd_per_million_tokens",
        "usd_per_million_tokens_all_in",
        "energy_kwh",
    ],
)
def test_an_unknown_figure_is_said_to_be_not_known(key):
    assert "not known" not in " ".join(rendered(SUMMARY).values())
    assert "not known" in " ".join(rendered({**SUMMARY, key: None}).values())


def test_without_a_price_both_costs_are_not_known_and_the_remedy_is_given():
    costs = dict.fromkeys([key for key in SUMMARY if key.startswith(("usd", "price"))])
    shown = rendered({**SUMMARY, **costs})
    assert shown["cost"] == shown["cost per million tokens"] == "not known: give hardware.price_usd_per_hour=…"


def test_an_offline_wandb_run_comes_with_the_commands_to_see_and_to_send_it():
    assert where_to_look(Path("/runs/a b"), "/runs/a b/wandb/offline-run-1") == [
        "run folder  /runs/a b",
        "view        wandb leet '/runs/a b/wandb/offline-run-1'",
        "upload      wandb sync '/runs/a b/wandb/offline-run-1'",
    ]
    assert where_to_look(Path("/r"), "/r/wandb/run-1")[2] == "upload      wandb sync --no-skip-online /r/wandb/run-1"
    assert where_to_look(Path("/r"), "https://wandb.invalid/r/1")[1] == "wandb       https://wandb.invalid/r/1"
    assert where_to_look(Path("/r"), None) == ["run folder  /r"]


def test_notes_are_a_line_each_however_long():
    out = console()
    print_notes(["short", "long " * 60], out)
    assert text(out).splitlines() == ["note: short", f"note: {'long ' * 60}"]
