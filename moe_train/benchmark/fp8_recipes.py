"""suite=precision: a whole step by FP8 recipes against the compute format, in speed and memory."""

from __future__ import annotations

from typing import Any

import torch

from moe_train.benchmark.arms import TrainingArm, rates
from moe_train.benchmark.bench import Bench, described
from moe_train.benchmark.figures import Figure, estimate, measured, not_measured, paired
from moe_train.benchmark.step_memory import peak_bytes
from moe_train.benchmark.timing import interleaved
from moe_train.precision import recipes

RECIPES = ("fp8_deepseek", "fp8_rowwise", "fp8_tensorwise")
HIDDEN_SIZES = (1024, 2048, 4096)


def run(bench: Bench, *usually: str, names: tuple[str, ...] = RECIPES) -> list[Figure]:
    """Of the recipe that is given with precision=, as it is given, or of `names`."""
    given = bench.config().precision.fp8 is not None
    figures = []
    for settings in [usually] if usually else sizes(bench):
        for name in (None,) if given else names:
            figures += _compared(bench, settings, name)
    return figures


def sizes(bench: Bench) -> list[tuple[str, ...]]:
    """On a GPU three widths with experts a quarter as wide (DeepSeek-V3: 2,048 of 7,168), else a small model."""
    if any(override.startswith("model=") for override in bench.given):
        return [()]
    if not bench.on_gpu:
        return [("model=nano", "batch_size=4")]
    return [
        (
            "model=base",
            f"model.name=hidden_{hidden}",
            f"model.hidden_size={hidden}",
            "model.num_hidden_layers=4",
            f"model.intermediate_size={5 * hidden // 2}",
            f"model.attention.num_attention_heads={hidden // 64}",
            "model.moe.num_experts=32",
            "model.moe.num_shared_experts=1",
            f"model.moe.moe_intermediate_size={hidden // 4}",
            "data.sequence_length=2048",
            "batch_size=8",
        )
        for hidden in HIDDEN_SIZES
    ]


def _compared(bench: Bench, settings: tuple[str, ...], name: str | None) -> list[Figure]:
    high = bench.config(*settings, without=["precision"])
    low = bench.config(*settings)
    if name is not None:
        low = bench.config(*settings, f"precision={name}", without=["precision"])
    of, suite, device = f"{low.precision.name}: {described(low, bench.runtime)}", bench.suite, bench.runtime.device
    bench.let_go()
    try:
        arms = {"high": TrainingArm(high, bench.runtime), "low": TrainingArm(low, bench.runtime)}
        seconds = interleaved(
            {key: arm.step for key, arm in arms.items()},
            device,
            rounds=bench.effort.rounds,
            budget_seconds=bench.effort.budget_seconds,
        )
        peaks = {key: peak_bytes(arm.launched_step, arm.state(), device) for key, arm in arms.items()}
    except torch.OutOfMemoryError:
        return [not_measured(suite, key, "ratio", "out of memory", of) for key in ("fp8_speedup", "fp8_memory_ratio")]
    against = f"against {str(bench.runtime.dtype).removeprefix('torch.')}; {_how(arms['low'])}"
    tokens = arms["low"].tokens
    return [
        measured(suite, "fp8_speedup", paired(seconds["high"], seconds["low"]), "ratio", of, against),
        measured(suite, "fp8_tokens_per_second", estimate(rates(tokens, seconds["low"])), "tokens/s", of),
        measured(suite, "high_precision_tokens_per_second", estimate(rates(tokens, seconds["high"])), "tokens/s", of),
        Figure(suite, "fp8_memory_ratio", peaks["low"] / peaks["high"], "ratio", of,
               note=f"{peaks['low'] / 1e6:,.0f} MB against {peaks['high'] / 1e6:,.0f} MB at the peak of a step"),
    ]  # fmt: skip


def _how(arm: TrainingArm) -> str:
    """Which backends the recipe's products went through, from the table that a run keeps."""
    rows: list[dict[str, Any]] = recipes.table(arm.model, torch.bfloat16, torch.device("cpu"))
    backends = sorted({row["backend"] for row in rows if "backend" in row})
    said = f"backend {', '.join(backends)}"
    if backends == ["emulated"]:
        formats = " and ".join(sorted({row["multiplied_in"] for row in rows if "backend" in row}))
        said += f": FP8 values multiplied in {formats}, slower by what the rounding costs; of FP8 units it says nothing"
    return said
