"""What a run reads, and when. Between the steps that it logs never a tensor's values: on a GPU it would wait for the
device there. A counter of energy once a row: of a GPU that can take milliseconds, as long as a small model's step."""

from __future__ import annotations

import json
import sys

from command_line import Commands

# The command with the reads of each step, and of what follows it, counted.
COUNTED = """
import json, sys
from moe_train.benchmark.host_reads import HostReads
from moe_train.compose import compose_run
from moe_train.cost.energy import EnergyMeter
from moe_train.training.loop import Run
from moe_train.training.run import train

plain, joules, energy_reads = Run._step, EnergyMeter.joules, []

def counted_joules(meter):
    energy_reads.append(meter)
    return joules(meter)

def counted(run, *arguments):
    energy_reads.clear()
    with HostReads() as reads:
        progress = plain(run, *arguments)
    print("READS", json.dumps([run.steps_done, [reads.everywhere, len(energy_reads)]]))
    return progress

EnergyMeter.joules = counted_joules

Run._step = counted
train(compose_run(sys.argv[1:], "test"))
"""


def reads_of_a_run(commands: Commands, *settings: str) -> dict[int, tuple[dict[str, int], int]]:
    """By step: where a tensor's values were read how often, and how often energy was."""
    said = commands.run(sys.executable, "-c", COUNTED, *commands.tiny, "run_dir=run", *settings).stdout.splitlines()
    return dict(json.loads(line.removeprefix("READS ")) for line in said if line.startswith("READS "))


def test_a_run_reads_at_the_steps_that_it_logs_and_at_no_other(commands: Commands) -> None:
    reads = reads_of_a_run(commands, "tracking.log_every_steps=3", "stop.steps=8")
    assert [step for step, (places, _) in reads.items() if places] == [3, 6, 8]
    assert [step for step, (places, _) in reads.items() if not places] == [1, 2, 4, 5, 7]


def test_energy_is_read_once_a_row_and_where_training_begins_again_after_something_else(commands: Commands) -> None:
    settings = ["tracking.log_every_steps=2", "stop.steps=12", "checkpoint.every_steps=6", "cost.watts=10"]
    energy = {step: reads for step, (_, reads) in reads_of_a_run(commands, *settings).items()}
    assert energy == {1: 1, 2: 1, 3: 0, 4: 1, 5: 0, 6: 1, 7: 1, 8: 1, 9: 0, 10: 1, 11: 0, 12: 1}
