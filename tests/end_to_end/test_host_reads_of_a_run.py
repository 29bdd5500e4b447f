"""Between the steps that it logs, a run never reads a tensor's values: on a GPU it would wait for the device there."""

from __future__ import annotations

import json
import sys

from command_line import Commands

# The command with the reads of each step, and of what follows it, counted.
COUNTED = """
import json, sys
from moe_train.benchmark.host_reads import HostReads
from moe_train.compose import compose_run
from moe_train.training.run import Run, train

plain = Run._step

def counted(run, *arguments):
    with HostReads() as reads:
        progress = plain(run, *arguments)
    print("READS", json.dumps([run.steps_done, reads.everywhere]))
    return progress

Run._step = counted
train(compose_run(sys.argv[1:], "test"))
"""


def test_a_run_reads_at_the_steps_that_it_logs_and_at_no_other(commands: Commands) -> None:
    settings = [*commands.tiny, "run_dir=run", "tracking.log_every_steps=3", "stop.steps=8"]
    said = commands.run(sys.executable, "-c", COUNTED, *settings).stdout.splitlines()
    reads = dict(json.loads(line.removeprefix("READS ")) for line in said if line.startswith("READS "))
    assert [step for step, places in reads.items() if places] == [3, 6, 8]
    assert [step for step, places in reads.items() if not places] == [1, 2, 4, 5, 7]
