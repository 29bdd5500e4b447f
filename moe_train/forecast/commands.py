"""The questions of `scripts/forecast.py`: each gathers what it needs, shows the answer and returns it for the JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from moe_train.compose import CONFIGS, ComposedModel, compose_model
from moe_train.config import HardwareConfig
from moe_train.cost.fit import fit
from moe_train.cost.fp8_operands import Fp8Kept
from moe_train.cost.hardware import GIVEN, at_the_launchers_price, load_hardware
from moe_train.cost.kernels import Kernels
from moe_train.cost.layout import Layout
from moe_train.errors import UsageError, UserError
from moe_train.forecast import probe, tables
from moe_train.forecast.published import PublishedRun, published_runs
from moe_train.forecast.training_run import GB, Plan, Precision, forecast, layouts_to_try
from moe_train.forecast.utilization_model import (
    LEVEL,
    LeftOut,
    constant_baseline,
    fitted,
    leave_one_out,
    median_error,
    within,
)

_FITTED = ("nano", "tiny", "small", "base", "dense_base", "olmoe_1b_7b", "llama_3_1_8b")


Parallel = Literal["auto", "single", "ddp", "fsdp2", "ep", "ep_fsdp2"]


class _Asked(Protocol):
    tokens: int | None
    hardware: str | None
    num_gpus: int
    precision: str | None
    parallel: Parallel
    expert_parallel: int | None
    micro_batch: int
    sequence_length: int | None
    vocab_size: int | None
    activation_checkpointing: Literal["auto", "true", "false"]
    price_usd_per_hour: float | None


def forecast_of(asked: _Asked, overrides: list[str], config_dir: Path | None) -> dict[str, Any]:
    """A run that was not made."""
    if asked.tokens is None:
        raise UsageError("tokens= is missing: give how many the run trains on, e.g. tokens=1_000_000_000")
    hardware = named_hardware(asked.hardware, asked.price_usd_per_hour, config_dir)
    composed = compose_model(overrides, config_dir)
    model = composed.model.resolved()
    if asked.parallel == "auto":
        if asked.expert_parallel is not None:
            raise UsageError("expert_parallel= goes with parallel=ep or ep_fsdp2: give one of them")
        layouts = layouts_to_try(model, asked.num_gpus)
    else:
        layouts = [Layout.named(asked.parallel, asked.num_gpus, asked.expert_parallel)]
    choice = asked.activation_checkpointing
    plan = Plan(
        model=model,
        vocab_size=_vocab_size(asked, composed),
        optimizer=composed.optimizer,
        tokens=asked.tokens,
        sequence_length=asked.sequence_length or composed.sequence_length,
        hardware=hardware,
        num_devices=asked.num_gpus,
        precision=precision_of(asked.precision),
        layouts=layouts,
        micro_batch=asked.micro_batch,
        activation_checkpointing=None if choice == "auto" else choice == "true",
    )
    content = forecast(plan, fitted(published_runs()))
    tables.show_forecast(content)
    return content


def published() -> dict[str, Any]:
    """The published runs, each predicted from the others."""
    runs = published_runs()
    left_out, nested = leave_one_out(runs), leave_one_out(runs, ridge=None)
    baseline = constant_baseline(runs)
    content: dict[str, Any] = {"level": LEVEL, "rows": [_row(prediction) for prediction in left_out]}
    for prefix, predictions in (("", left_out), ("nested_", nested), ("baseline_", baseline)):
        content[f"{prefix}median_error"] = median_error(predictions)
        content[f"{prefix}within_1_5x"] = within(predictions, 1.5)
    content["interval_coverage"] = sum(prediction.held for prediction in left_out) / len(left_out)
    content["notes"] = [
        "the form of the model was chosen among many on these runs (docs/log.md), so a new run will be predicted "
        "somewhat worse than those left out; the second line chooses part of it without the run",
    ]
    tables.show_published(content)
    return content


def _row(prediction: LeftOut) -> dict[str, Any]:
    run: PublishedRun = prediction.run
    return {
        "model": run.model,
        "kind": run.kind,
        "hardware": run.hardware,
        "published_gpu_hours": run.gpu_hours,
        "predicted_gpu_hours": prediction.gpu_hours,
        "interval": list(prediction.interval),
        "held": prediction.held,
        "ratio": prediction.ratio,
        "utilization": run.utilization,
        "predicted_utilization": prediction.utilization,
        "evidence": run.evidence,
        "source": run.source,
    }


def fitting(asked: _Asked, overrides: list[str], config_dir: Path | None) -> dict[str, Any]:
    """What fits one device: of the model that is named, or of a list of them."""
    hardware = named_hardware(asked.hardware, asked.price_usd_per_hour, config_dir)
    if hardware.memory_gb is None:
        raise UserError(f"the memory of hardware={hardware.name} is not known: choose another or give it in its file")
    chosen = any(override.startswith("model=") for override in overrides)
    if asked.precision is not None:
        overrides = [f"precision={asked.precision}", *overrides]
    asked_for = [overrides] if chosen else [[f"model={name}", *overrides] for name in _FITTED]
    composed = [compose_model(each, config_dir) for each in asked_for]
    precision, peaks = composed[0].precision, hardware.peak_tflops
    # Before there are FP8 units, it is kept in FP8 all the same (precision/choice.py), by cards that have BF16.
    if precision.fp8 is not None and peaks.bfloat16 is None:
        raise UserError(f"precision={precision.name}: {hardware.name} runs no kernel that keeps FP8: choose auto")
    narrow = precision.compute_dtype != "float32" and peaks.bfloat16 is not None
    rows = []
    for each in composed:
        rows += fit(
            int(hardware.memory_gb * GB),
            [(each.model.name, each.model, _vocab_size(asked, each))],
            sequence_length=asked.sequence_length or each.sequence_length,
            optimizer=each.optimizer,
            compute_bytes=2 if narrow else 4,
            fp8=Fp8Kept.by(precision.fp8),
            kernels=Kernels.TORCH if peaks.bfloat16 is None else Kernels.TRITON,
        )
    tables.show_fit(rows, hardware.name)
    return {
        "hardware": hardware.name,
        "memory_bytes": int(hardware.memory_gb * GB),
        "compute_dtype": "bfloat16" if narrow else "float32",
        "precision": precision.name,
        "rows": [asdict(row) for row in rows],
    }


def probed(overrides: Sequence[str], tokens: int | None, against: Path | None) -> dict[str, Any]:
    """A run on the device at hand, from its first steps."""
    if tokens is None:
        raise UsageError("tokens= is missing: give how many the run trains on, e.g. tokens=1_000_000")
    if against is not None:
        probe.finished(against)  # before the probe is made
    content = probe.probe(overrides, tokens)
    if against is not None:
        content["against"] = probe.compare(content, against)
    tables.show_probe(content)
    return content


def named_hardware(name: str | None, price_usd_per_hour: float | None, config_dir: Path | None) -> HardwareConfig:
    """By name, from the user's folder or from configs/; with the user's price where one is given. Raises UserError."""
    known = sorted(path.stem for path in (CONFIGS / "hardware").glob("*.yaml") if path.stem not in ("auto", "cpu"))
    if name is None:
        raise UsageError(f"hardware= is missing: choose one of {', '.join(known)}")
    folders = ([] if config_dir is None else [config_dir]) + [CONFIGS]
    files = [folder / f"hardware/{name}.yaml" for folder in folders]
    found = next((file for file in files if "/" not in name and file.is_file()), None)
    if found is None or name == "auto":
        raise UserError(f"there is no hardware={name}: choose one of {', '.join(known)}")
    hardware = load_hardware(found)
    if not hardware.match:
        raise UserError(f"hardware={name}: no published run is of such a device: probe=true measures the one at hand")
    if price_usd_per_hour is None:
        return at_the_launchers_price(hardware, os.environ)
    return at_price(hardware, price_usd_per_hour)


def at_price(hardware: HardwareConfig, price_usd_per_hour: float) -> HardwareConfig:
    """At the user's own price."""
    return replace(
        hardware,
        price_usd_per_hour=price_usd_per_hour,
        price_range_usd_per_hour=None,
        price_source=GIVEN,
        price_date=None,
    )


def precision_of(name: str | None) -> Precision:
    """What products are in, `precision=` of a forecast. Raises UsageError."""
    if name in (None, "bf16"):
        return "bf16"
    if name == "fp8":
        return "fp8"
    raise UsageError(f"precision={name}: choose one of bf16, fp8, the formats that published runs were made in")


def _vocab_size(asked: _Asked, composed: ComposedModel) -> int:
    return asked.vocab_size or composed.model.vocab_size or composed.default_vocab_size
