"""What a training run would take on devices one may not have: memory, speed, hours, dollars, energy.

    share of the peak (from published runs) → tokens/s → device hours → dollars, energy
    layout over devices → memory of one device → whether it fits

Speed is 6 x active parameters a token against the dense BF16 peak, the measure the published runs are known by; they
trained on sequences of around 4,096 tokens, so that at other lengths it changes as the FLOPs a token do. It holds for
runs like those: large batches on data-centre devices, from 0.16B active parameters up. For anything else a probe
measures (`probe.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any, Literal

from moe_train.compose import PUBLISHED_LENGTH
from moe_train.config import HardwareConfig, ModelConfig, OptimizerConfig
from moe_train.cost.fit import usable_bytes
from moe_train.cost.flops import parameter_counts, training_flops_per_token
from moe_train.cost.fp8_operands import Fp8Kept
from moe_train.cost.hardware import age_note
from moe_train.cost.layout import Layout
from moe_train.cost.memory import PeakMemory, peak_training_memory
from moe_train.errors import UserError
from moe_train.forecast.interval import Interval
from moe_train.forecast.utilization_model import LEVEL, UtilizationModel

GB = 10**9  # vendors' gigabytes: never more than what a driver shows
# Share of the rated power a device draws while training: near all of it in dense products, less while it waits. An
# assumption, not a measurement; hosts and cooling are left out.
POWER = Interval(0.8, 0.5, 1.0)

Precision = Literal["bf16", "fp8"]


@dataclass(frozen=True)
class Plan:
    """A run to be forecast. `micro_batch`: sequences a device takes at once."""

    model: ModelConfig
    vocab_size: int
    optimizer: OptimizerConfig
    tokens: int
    sequence_length: int
    hardware: HardwareConfig
    num_devices: int
    precision: Precision
    layouts: Sequence[Layout]  # in order of preference: the first that fits is taken
    micro_batch: int
    activation_checkpointing: bool | None  # None: only where it does not fit without


def forecast(plan: Plan, utilization: UtilizationModel) -> dict[str, Any]:
    """All figures, intervals as {value, low, high} at the level of the utilisation model. Raises UserError."""
    model, hardware = plan.model.resolved(), plan.hardware
    peak = hardware.peak_tflops.bfloat16
    if peak is None:
        raise UserError(
            f"hardware={hardware.name} has no BF16 peak to take a share of: choose another, or measure with probe=true"
        )
    if plan.precision == "fp8" and hardware.peak_tflops.float8 is None:
        raise UserError(f"hardware={hardware.name} multiplies no FP8: choose precision=bf16")
    counts = parameter_counts(model, plan.vocab_size)
    flops = training_flops_per_token(model, plan.sequence_length, plan.vocab_size)
    kind = "dense" if model.moe is None else "moe"
    log_sparsity = math.log((counts.total - counts.mtp) / counts.active)
    share = Interval.around(utilization.predict(kind, log_sparsity, plan.precision), utilization.error)
    at_published_length = training_flops_per_token(model, PUBLISHED_LENGTH, plan.vocab_size)
    per_device = share * (peak * 1e12 / (6 * counts.active) * at_published_length / flops)
    hours = per_device.under(plan.tokens / 3600)
    memory = _memory(plan)
    figures: dict[str, Any] = {
        "model": model.name,
        "tokens": plan.tokens,
        "sequence_length": plan.sequence_length,
        "vocab_size": plan.vocab_size,
        "total_params": counts.total,
        "active_params": counts.active,
        "flops_per_token": flops,
        "flops": flops * plan.tokens,
        "hardware": hardware.name,
        "num_devices": plan.num_devices,
        "precision": plan.precision,
        "memory": memory,
        "level": LEVEL,
        "utilization_of_bf16_peak": share,
        "model_flops_utilization": share * (at_published_length / (6 * counts.active)),
        "tokens_per_second": per_device * plan.num_devices,
        "gpu_hours": hours,
        "days": hours * (1 / 24 / plan.num_devices),
        "usd": None,
        "usd_at_market_prices": None,
        "price_usd_per_hour": hardware.price_usd_per_hour,
        "price_source": hardware.price_source,
        "price_date": hardware.price_date,
        "energy_kwh": None,
        "notes": _notes(plan, utilization, counts.active, math.exp(log_sparsity), memory),
    }
    if hardware.price_usd_per_hour is not None:
        figures["usd"] = hours * hardware.price_usd_per_hour
        asked = (hardware.price_usd_per_hour, *(hardware.price_range_usd_per_hour or ()))
        low, high = min(asked), max(asked)
        figures["usd_at_market_prices"] = Interval(
            hours.value * hardware.price_usd_per_hour, hours.low * low, hours.high * high
        )
    if hardware.tdp_w is not None:
        kw = hardware.tdp_w / 1000
        figures["energy_kwh"] = Interval(
            hours.value * kw * POWER.value, hours.low * kw * POWER.low, hours.high * kw * POWER.high
        )
    return {key: asdict(value) if isinstance(value, Interval) else value for key, value in figures.items()}


def layouts_to_try(model: ModelConfig, num_devices: int) -> list[Layout]:
    """From the simplest to the one that holds the least on each device."""
    if num_devices == 1:
        return [Layout.named("single")]
    found = [Layout.named(name, num_devices) for name in ("ddp", "fsdp2")]
    moe = model.resolved().moe
    if moe is not None:
        found.append(Layout.named("ep_fsdp2", num_devices, math.gcd(moe.num_experts, num_devices)))
    return found


def _memory(plan: Plan) -> dict[str, Any]:
    """Of the first layout that fits, without activation checkpointing if it can be; else of the smallest."""
    size = plan.hardware.memory_gb
    room = None if size is None else usable_bytes(int(size * GB))
    ways = [False, True] if plan.activation_checkpointing is None else [plan.activation_checkpointing]
    tried: list[tuple[PeakMemory, Layout, bool]] = []
    for layout in plan.layouts:
        for checkpointing in ways:
            peak = _peak(plan, layout, checkpointing)
            tried.append((peak, layout, checkpointing))
            if room is not None and peak.bytes <= room:
                return _described(tried[-1], room, size, plan)
    smallest = min(tried, key=lambda way: way[0].bytes) if room is not None else tried[0]
    return _described(smallest, room, size, plan)


def _peak(plan: Plan, layout: Layout, activation_checkpointing: bool) -> PeakMemory:
    layout.check(plan.model.resolved())
    return peak_training_memory(
        plan.model.resolved(),
        plan.vocab_size,
        sequences=plan.micro_batch,
        sequence_length=plan.sequence_length,
        optimizer=plan.optimizer,
        compute_bytes=2,
        activation_checkpointing=activation_checkpointing,
        accumulates=True,
        layout=layout,
        device_type="cuda",
        fp8=Fp8Kept() if plan.precision == "fp8" else None,
    )


def _described(
    way: tuple[PeakMemory, Layout, bool], room: int | None, size: float | None, plan: Plan
) -> dict[str, Any]:
    peak, layout, checkpointing = way
    return {
        "layout": dataclasses.asdict(layout),
        "micro_batch": plan.micro_batch,
        "activation_checkpointing": checkpointing,
        "optimizer": plan.optimizer.kind,
        "parts": peak.parts,
        "peak_bytes": peak.bytes,
        "peak_moment": peak.moment,
        "device_bytes": None if size is None else int(size * GB),
        "usable_bytes": room,
        "fits": None if room is None else peak.bytes <= room,
    }


def _notes(
    plan: Plan, utilization: UtilizationModel, active: int, sparsity: float, memory: dict[str, Any]
) -> list[str]:
    fits, checkpointing = memory["fits"], memory["activation_checkpointing"]
    smallest, largest = utilization.range_of_params
    notes = []
    if not smallest <= active <= largest:
        notes.append(
            f"{active / 1e9:.3g}B active parameters lie outside the published runs ({smallest / 1e9:.2g}B to "
            f"{largest / 1e9:.3g}B): the interval is too narrow; probe=true measures on the device at hand"
        )
    if sparsity > utilization.max_sparsity:
        notes.append(f"the published runs have at most {utilization.max_sparsity:.0f} times the active parameters")
    if plan.hardware.name not in ("a100_40", "a100_80", "h100", "h800"):
        notes.append(f"no published run was made on {plan.hardware.name}: the share of its peak is that of others")
    if fits is False:
        notes.append("it does not fit: raise num_gpus, lower micro_batch or sequence_length, or choose parallel=auto")
    if checkpointing:
        notes.append("what is recomputed is not added to the hours: published runs recomputed some as well")
    price = plan.hardware
    old = age_note(price.name, price.price_date, price.price_source, date.today(), "price_usd_per_hour")
    if price.price_usd_per_hour is not None and old:
        notes.append(old)
    return notes
