"""The suites by name, and a benchmark from the first ceiling to the table."""

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
    tax,
)
from moe_train.benchmark.bench import Bench, vocabulary
from moe_train.benchmark.figures import Figure
from moe_train.benchmark.results import Content, content_of, load_average
from moe_train.errors import UsageError

SUITES: dict[str, Callable[[Bench], list[Figure]]] = {
    "step": step.run,
    "peer": peer.run,
    "tax": tax.run,
    "kernels": kernels.run,
    "experts": experts.run,
    "precision": fp8_recipes.run,
    "startup": startup.run,
    "smoke": smoke.run,
}


def chosen(text: str) -> list[str]:
    """The suites of `suite=a,b` or `suite=all`, which is all but the short one. Raises UsageError."""
    if text == "all":
        return [name for name in SUITES if name != "smoke"]
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in SUITES:
            raise UsageError(f"suite={name} is unknown: choose from {', '.join(SUITES)}, several with commas, or all")
    return names


def run(bench: Bench, names: Sequence[str]) -> Content:
    """What the suites `names` measured on the runtime's device."""
    load = load_average()
    config = bench.config(*step.usual(bench))
    hidden, tokens = (
        config.model.hidden_size,
        (config.micro_batch_size or config.batch_size) * config.data.sequence_length,
    )
    # Of a dense FFN and of the output head: what most of a small model's products are like.
    sizes = [(tokens, hidden, 2 * config.model.intermediate_size), (tokens, hidden, vocabulary(config))]
    limits = ceilings.measure(bench.runtime.device, bench.runtime.dtype, sizes, rounds=5)
    figures: list[Figure] = []
    for name in names:
        sys.stdout.write(f"measuring suite={name}\n")
        sys.stdout.flush()
        figures += SUITES[name](bench.filed_under(name))
        bench.runtime.accelerator.free_memory()  # it keeps every model that it prepared
    return content_of(bench.runtime, names, limits, figures, load)
