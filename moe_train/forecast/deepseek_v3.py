"""The $5.576M of DeepSeek-V3 taken apart: what it multiplies, what speed it implies, what moves it, what it leaves out.

GPU-hours by phase and the price are the report's (arXiv 2412.19437, table 1), and so are the tokens; everything else
follows from the architecture's configuration and the files of this repository.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from moe_train.config import HardwareConfig, ModelConfig
from moe_train.cost.flops import parameter_counts, training_flops_per_token
from moe_train.cost.utilization import flops_by_format, ideal_seconds
from moe_train.forecast.published import PublishedRun
from moe_train.forecast.training_run import POWER
from moe_train.forecast.utilization_model import leave_one_out

PHASES = {"pre-training": 2_664_000, "context extension": 119_000, "post-training": 5_000}  # H800 hours
PRICE = 2.00  # dollars an H800 hour, assumed by the report
TOKENS = 14.8e12
SEQUENCE_LENGTH = 4096
PEER = "Llama-3.1-405B"  # the dense model of its time that it was compared with
PRICES = (1.0, 2.0, 3.0, 5.0)
UTILIZATIONS = (0.20, 0.30, 0.39, 0.50)  # of the BF16 peak
TARIFF = 0.10  # dollars a kWh, an assumption
LIFE_HOURS = 26_280  # three years round the clock, an assumption

# What the report says itself that it leaves out, and what a price per GPU-hour cannot show.
LEFT_OUT = (
    "research and ablations on architecture, algorithms and data before the run (the report says so, section 1)",
    "runs that failed, were restarted or served to tune: no figure was published",
    "buying the cluster: one disputed third-party estimate of all servers is $1.6B of capital expenditure",
    "salaries, data, and the inference that made the post-training data",
    "whatever the cluster cost while it did not train",
)


@dataclass(frozen=True)
class Sensitivity:
    """Dollars of pre-training at a rental price and a share of the BF16 peak; the report's tokens and FLOPs."""

    price_usd_per_hour: float
    utilization: float
    usd: float


def recompute(
    model: ModelConfig, vocab_size: int, h800: HardwareConfig, bought: HardwareConfig, runs: list[PublishedRun]
) -> dict[str, Any]:
    """The table and what follows from it. `model` is DeepSeek-V3's configuration, without its MTP module.

    `bought`: the device whose purchase price stands for an H800's, of which none was published.
    """
    flops = training_flops_per_token(model, SEQUENCE_LENGTH, vocab_size)
    counts = parameter_counts(model, vocab_size)
    bf16, fp8 = h800.peak_tflops.bfloat16, h800.peak_tflops.float8
    if bf16 is None or fp8 is None:
        raise ValueError(f"{h800.name} needs its BF16 and FP8 peaks")
    seconds_per_token = PHASES["pre-training"] * 3600 / TOKENS  # of one device
    rate = flops / seconds_per_token
    ideal = ideal_seconds(flops_by_format(model, SEQUENCE_LENGTH, vocab_size, "bfloat16", "float8"), h800.peak_tflops)
    own = next(run for run in runs if run.model == "DeepSeek-V3")
    left_out = next(p for p in leave_one_out(runs) if p.run.model == own.model)
    fastest_first = sorted(runs, key=lambda run: -run.utilization)
    peer = next(run for run in runs if run.model == PEER)
    hours = sum(PHASES.values())
    energy_kwh = hours * (h800.tdp_w or math.nan) / 1000
    return {
        "phases": [
            {"phase": phase, "gpu_hours": of_phase, "usd": round(of_phase * PRICE)}
            for phase, of_phase in PHASES.items()
        ],
        "gpu_hours": hours,
        "price_usd_per_hour": PRICE,
        "usd": round(hours * PRICE),
        "tokens": TOKENS,
        "total_params": counts.total,
        "active_params": counts.active,
        "flops_per_token": flops,
        "tokens_per_second_per_gpu": 1 / seconds_per_token,
        "tflops_per_gpu": rate / 1e12,
        "share_of_bf16_peak": rate / (bf16 * 1e12),
        "share_of_fp8_peak": rate / (fp8 * 1e12),
        "mixed_precision_utilization": None if ideal is None else ideal / seconds_per_token,
        "predicted_gpu_hours": left_out.gpu_hours,
        "predicted_interval": list(left_out.interval),
        "rank_among_published": 1 + fastest_first.index(own),
        "published": [
            {
                "model": run.model,
                "kind": run.kind,
                "utilization": run.utilization,
                "gpu_hours_per_trillion_tokens": run.gpu_hours / run.tokens * 1e12,
            }
            for run in fastest_first
        ],
        "peer": peer.model,
        "peer_usd": peer.gpu_hours * PRICE,
        "peer_ratio": peer.gpu_hours / PHASES["pre-training"],
        "sensitivity": [
            asdict(Sensitivity(price, share, TOKENS * flops / (share * bf16 * 1e12) / 3600 * price))
            for share in UTILIZATIONS
            for price in PRICES
        ],
        "energy_kwh": [energy_kwh * share for share in (POWER.low, POWER.value, POWER.high)],
        "usd_energy": [energy_kwh * share * TARIFF for share in (POWER.low, POWER.value, POWER.high)],
        "usd_per_kwh": TARIFF,
        "usd_ownership": None if bought.purchase_usd is None else bought.purchase_usd / LIFE_HOURS * hours,
        "ownership_of": bought.name,
        "left_out": list(LEFT_OUT),
    }
