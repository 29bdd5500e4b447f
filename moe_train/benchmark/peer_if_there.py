"""suite=peer where transformers can be imported, and the reason why not where it cannot."""

from __future__ import annotations

import importlib

from moe_train.benchmark import peer
from moe_train.benchmark.bench import Bench
from moe_train.benchmark.figures import Figure, not_measured
from moe_train.errors import one_line


def run(bench: Bench, *usually: str) -> list[Figure]:
    try:
        _ = importlib.import_module("transformers").AutoModelForCausalLM
    except (ImportError, RuntimeError) as error:  # what its lazy modules raise
        why = f"transformers cannot be imported ({one_line(error)[:160]}): pip install 'transformers>=5,<6'"
        return [not_measured(bench.suite, name, "ratio", why) for name in ("peer_speedup", "peak_memory_ratio")]
    return peer.run(bench, *usually)
