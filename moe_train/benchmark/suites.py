"""The suites of `choices.py`, and a benchmark from the first ceiling to the table."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence

from moe_train.benchmark import (
    ceilings,
    experts,
    fp8_recipes,
    kernels,
    peer_if_there,
    smoke,
    startup,
    step,
    tables,
    tax,
)
from moe_train.benchmark.bench import Bench, said_in_full
from moe_train.benchmark.figures import Figure, marked
from moe_train.benchmark.results import Content, content_of
from moe_train.machine import load_average

_RUN: dict[str, Callable[[Bench], list[Figure]]] = {
    "step": step.run,
    "peer": peer_if_there.run,
    "tax": tax.run,
    "kernels": kernels.run,
    "experts": experts.run,
    "precision": fp8_recipes.run,
    "startup": startup.run,
    "smoke": smoke.run,
}

# Settings that a suite's own words for what it measured speak of.
_SAID = ("model", "model.name", "optimizer", "precision", "batch_size", "micro_batch_size", "data.sequence_length")
_SAID_OF_STARTUP = ("model", "model.name")
_USUAL_EXPERTS = ("tax", "peer", "experts")  # on a GPU have a model of their own if none is given, by a published name


def check(bench: Bench, name: str) -> None:
    """Raise UserError where the model is none that the suite can compare."""
    settings = smoke.USUAL if name == "smoke" else tax.usual(bench)
    config = bench.config(*settings)
    if name in ("tax", "smoke"):
        tax.dense_twin(config)
    if name in ("experts", "smoke"):
        for count in (experts.FEW, experts.MANY):
            experts.with_experts(config, count)
    if name == "kernels":
        kernels.shapes(config, bench.on_gpu)


def _said(bench: Bench, name: str) -> tuple[str, ...]:
    if name == "startup":
        return _SAID_OF_STARTUP
    return _SAID[1:] if bench.on_gpu and name in _USUAL_EXPERTS else _SAID


def run(bench: Bench, names: Sequence[str], keep: Callable[[str, Content, Sequence[Figure]], None]) -> None:
    """Measure the suites `names` on the runtime's device; each is kept and shown as it comes."""
    for name in names:
        check(bench, name)
    load = load_average()
    config = bench.config(*step.usual(bench))
    hidden, rows = config.model.hidden_size, config.micro_batch_size or config.batch_size
    tokens = rows * config.data.sequence_length
    # Of a dense FFN and of the output head: what most of a small model's products are like.
    sizes = [(tokens, hidden, 2 * config.model.intermediate_size), (tokens, hidden, config.vocab_size)]
    device, dtype = bench.runtime.device, bench.runtime.dtype
    before = ceilings.measure(device, dtype, sizes, rounds=5)
    tables.show_device(bench.runtime, before, load)
    figures: list[Figure] = []
    for name in names:
        sys.stdout.write(f"measuring suite={name}\n")
        sys.stdout.flush()
        found = [
            dataclasses.replace(figure, of=said_in_full(figure.of, bench, _said(bench, name)))
            for figure in _RUN[name](bench.filed_under(name))
        ]
        bench.let_go()
        after = dataclasses.replace(ceilings.measure(device, dtype, (), rounds=5), products=before.products)
        found = [marked(figure, ceilings.drift(before, after)) for figure in found]
        keep(name, content_of(bench.runtime, name, (before, after), found, load), found)
        tables.show(found)
        figures += found
        before = after
    tables.show_doubts(figures)
