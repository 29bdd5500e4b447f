"""Training runs whose GPU-hours were published: what a cost model can be tested on.

`published_runs.csv` beside this file has them with their sources. `evidence` says how well each is backed: primary was
read in the source itself, secondary in another text that cites it, derived was computed from the source's figures.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_train.compose import CONFIGS
from moe_train.cost.hardware import load_hardware

FILE = Path(__file__).with_name("published_runs.csv")
# Pythia trained in FP16, which an A100 multiplies as fast as BF16.
PEAK_FORMAT = "bfloat16"


@dataclass(frozen=True)
class PublishedRun:
    """`flops` are 6 x active parameters x tokens: shapes were not published for all, so attention is left out."""

    model: str
    kind: Literal["dense", "moe"]
    total_params: float
    active_params: float
    tokens: float
    hardware: str
    gpu_hours: float
    precision: Literal["bf16", "fp16", "fp8"]
    evidence: str
    source: str
    peak_tflops: float  # dense BF16 peak of one device

    @property
    def flops(self) -> float:
        return 6 * self.active_params * self.tokens

    @property
    def utilization(self) -> float:
        """Share of the BF16 peak that 6 x active x tokens took; an FP8 run is measured against it too."""
        return self.flops / (self.gpu_hours * 3600 * self.peak_tflops * 1e12)

    def hours_at(self, utilization: float) -> float:
        """GPU-hours had the run used that share of the peak."""
        return self.gpu_hours * self.utilization / utilization

    @property
    def log_sparsity(self) -> float:
        """Of total over active parameters; 0 for a dense model."""
        return math.log(self.total_params / self.active_params)


def published_runs() -> list[PublishedRun]:
    peaks = {}
    with FILE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in {row["hardware"] for row in rows}:
        peak: float = getattr(load_hardware(CONFIGS / f"hardware/{name}.yaml").peak_tflops, PEAK_FORMAT)
        peaks[name] = peak
    return [
        PublishedRun(
            model=row["model"],
            kind="moe" if row["kind"] == "moe" else "dense",
            total_params=float(row["total_params_b"]) * 1e9,
            active_params=float(row["active_params_b"]) * 1e9,
            tokens=float(row["tokens_b"]) * 1e9,
            hardware=row["hardware"],
            gpu_hours=float(row["gpu_hours"]),
            precision=row["precision"],  # type: ignore[arg-type]
            evidence=row["evidence"],
            source=row["source"],
            peak_tflops=peaks[row["hardware"]],
        )
        for row in rows
    ]
