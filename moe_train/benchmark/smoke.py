"""suite=smoke: a little of everything that one process can measure, within a minute on two cores."""

from __future__ import annotations

import dataclasses

from moe_train.benchmark import experts, fp8_recipes, kernels, peer_if_there, step, tax
from moe_train.benchmark.bench import Bench, Effort
from moe_train.benchmark.figures import Figure

USUAL = ("model=nano", "batch_size=4", "data.sequence_length=128", "optimizer=adamw")
_EFFORT = Effort(rounds=3, budget_seconds=5.0, shortest_seconds=0.005)


def run(bench: Bench) -> list[Figure]:
    """Does it all run, and about how does this machine do? Three rounds on a small model: not for comparisons."""
    effort = _EFFORT if bench.effort == Effort() else dataclasses.replace(_EFFORT, rounds=bench.effort.rounds)
    small = dataclasses.replace(bench, effort=effort, compiles_peer=bool(bench.compiles_peer))
    return [
        *step.run(small, *USUAL, with_a_run=False),
        *tax.run(small, *USUAL),
        *peer_if_there.run(small, *USUAL),
        *experts.run(small, *USUAL),
        *kernels.run(small, *USUAL),
        *fp8_recipes.run(small, *USUAL, names=("fp8_deepseek",)),
    ]
