"""wandb from the command line: runs of a sweep sent to a server, and the workspace that shows what they cost."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from command_line import Commands
from wandb_server import WandbServer


@pytest.fixture
def server(commands: Commands) -> Iterator[WandbServer]:
    server = WandbServer()
    commands.environment |= {**server.environment, "HOME": str(commands.folder)}
    yield server
    server.close()


def test_runs_of_a_sweep_are_a_group_and_add_up_its_dollars(commands: Commands, server: WandbServer) -> None:
    for seed in (0, 1):
        result = commands.train(
            f"seed={seed}", f"run_dir=run{seed}", "tracking.wandb=auto", "cost.sweep=seeds", "tracking.tags=[tiny]"
        )
        assert f"{server.environment['WANDB_BASE_URL']}/me/moe_train/runs/" in result.stdout
        assert "wandb sync" not in result.stdout
    assert len(server.runs) == 2
    assert all(run["groupName"] == "seeds" and run["tags"] == ["tiny"] for run in server.runs.values())
    config = json.loads(next(iter(server.runs.values()))["config"])
    assert config["model"]["value"]["moe"]["num_experts"] == 8

    first, second = commands.summary("run0"), commands.metrics("run1")
    for row in second:
        assert row["cost/usd_sweep"] == pytest.approx(first["usd_total"] + row["cost/usd_total"])
    bits, usd = second[-1]["val/bits_per_byte"], second[-1]["cost/usd_total"]
    # The whole bill as it stood after the evaluation, a moment later than the row's.
    assert (8 - bits) / usd * 0.5 < second[-1]["cost/bits_per_byte_a_dollar"] <= (8 - bits) / usd
    summary = commands.summary("run1")
    saved = 8 - summary["val_bits_per_byte"]
    assert summary["bits_per_byte_a_dollar"] == pytest.approx(saved / summary["usd_total"])
    assert server.summary["bits_per_byte_a_dollar"] == pytest.approx(summary["bits_per_byte_a_dollar"], rel=0.2)
