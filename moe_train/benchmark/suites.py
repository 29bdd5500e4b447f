"""The suites of `choices.py`, and a benchmark from the first ceiling to the table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from moe_train.benchmark import (
    ceilings,
    experts,
    fp8_recipes,
    kernels,
    peer,
    smoke,
    startup,
    step,
    tables,
    tax,
)
from moe_train.benchmark.bench import Bench
from moe_train.benchmark.figures import Figure
from moe_train.benchmark.results import Content, content_of, load_average

_RUN: dict[str, Callable[[Bench], list[Figure]]] = {
    "step": step.run,
    "peer": peer.run,
    "tax": tax.run,
    "kernels": kernels.run,
    "experts": experts.run,
    "precision": fp8_recipes.run,
    "startup": startup.run,
    "smoke": smoke.run,
}


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


def run(bench: Bench, names: Sequence[str]) -> Content:
    """What the suites `names` measured on the runtime's device, shown as it comes."""
    for name in names:
        check(bench, name)
    load = load_average()
    config = bench.config(*step.usual(bench))
    hidden, tokens = (
        config.model.hidden_size,
        (config.micro_batch_size or config.batch_size) * config.data.sequence_length,
    )
    # Of a dense FFN and of the output head: what most of a small model's products are like.
    sizes = [(tokens, hidden, 2 * config.model.intermediate_size), (tokens, hidden, config.vocab_size)]
    limits = ceilings.measure(bench.runtime.device, bench.runtime.dtype, sizes, rounds=5)
    tables.show_device(bench.runtime, limits, load)
    figures: list[Figure] = []
    for name in names:
        sys.stdout.write(f"measuring suite={name}\n")
        sys.stdout.flush()
        found = _RUN[name](bench.filed_under(name))
        tables.show(found)
        figures += found
        bench.runtime.accelerator.free_memory()  # it keeps every model that it prepared
    return content_of(bench.runtime, names, limits, figures, load)
