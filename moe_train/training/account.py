"""What a run spends: which device it is priced as, its meter, energy, limits and ledger, kept together.

The parts are in `cost/` and know nothing of training; here they are joined for one run on its devices and attempts.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from moe_train.compose import CONFIGS
from moe_train.config import RunConfig
from moe_train.cost.energy import EnergyMeter
from moe_train.cost.hardware import detect, price_per_device
from moe_train.cost.ledger import Ledger
from moe_train.cost.meter import Meter, process_start_seconds_ago
from moe_train.cost.peak import measured_matmul_tflops
from moe_train.training.limits import Limits, Spent
from moe_train.training.runtime import Runtime


class Account:
    """The figures of one run. Only rank 0 has a ledger; the other ranks' clocks decide nothing."""

    def __init__(self, config: RunConfig, runtime: Runtime, flops_per_token: float) -> None:
        self.runtime = runtime
        self.flops_per_token = flops_per_token
        self.hardware, notes = detect(config.hardware, CONFIGS, runtime.device_type, runtime.device_name, os.environ)
        self.price = price_per_device(self.hardware, runtime.device_type, runtime.num_threads)
        self.limits = Limits(config.stop, None if self.price is None else self.price * runtime.world_size / 3600)
        self.peak, self.peak_source = self._peak()
        self.energy = EnergyMeter(runtime.device_type, runtime.device.index or 0)
        self.notes = [*notes, *([self.energy.note] if self.energy.note and runtime.device_type == "cuda" else [])]
        self.earlier_joules = 0.0
        self.lost_seconds = 0.0
        self.ledger: Ledger | None = None
        self._open_meter(earlier_wall_seconds=0.0)

    def _open_meter(self, earlier_wall_seconds: float) -> None:
        self.meter = Meter(
            price_usd_per_hour=self.price,
            num_devices=self.runtime.world_size,
            flops_per_token=self.flops_per_token,
            peak_tflops_per_device=self.peak,
            already_elapsed=process_start_seconds_ago(),
            earlier_wall_seconds=earlier_wall_seconds,
        )

    def _peak(self) -> tuple[float | None, str | None]:
        """The rate utilisation is measured against: the hardware file's; a CPU's is measured, since none is printed."""
        dtype = "bfloat16" if self.runtime.dtype is torch.bfloat16 else "float32"
        peak: float | None = getattr(self.hardware.peak_tflops, dtype)
        if peak is None and self.runtime.device_type == "cpu":
            peak = measured_matmul_tflops(self.runtime.device, self.runtime.dtype)
            return peak, f"{peak:.3f} TFLOP/s, {dtype} matrix product measured at the start"
        return peak, None if peak is None else f"{peak:g} TFLOP/s {dtype}, {self.hardware.specification_source}"

    def open_ledger(self, run_folder: Path, checkpoint: dict[str, Any] | None) -> None:
        """Rank 0: take up the attempts made in this folder, and the figures of the checkpoint gone on from."""
        self.ledger = Ledger(run_folder / "ledger.json", already_elapsed=process_start_seconds_ago())
        self._open_meter(self.ledger.earlier_wall_seconds)
        at_checkpoint = self.take_up(checkpoint)
        self.lost_seconds = self.ledger.lost_seconds(at_checkpoint)

    def take_up(self, checkpoint: dict[str, Any] | None) -> float:
        """Go on counting from a checkpoint's state, or from nothing; returns the train seconds it holds."""
        if checkpoint is None:
            return 0.0
        self.meter.load_state_dict(checkpoint["meter"])
        self.earlier_joules = float(checkpoint["joules"] or 0.0)
        return self.meter.train_seconds

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps. All ranks call it: energy is summed over them."""
        return {"meter": self.meter.state_dict(), "joules": self.joules()}

    def joules(self) -> float | None:
        """Energy of all devices and of the attempts whose checkpoints were taken up; None if one cannot be read."""
        joules = self.energy.joules()
        known = torch.tensor([joules or 0.0, float(joules is None)], dtype=torch.float32, device=self.runtime.device)
        total, unknown = self.runtime.summed(known).tolist()
        return None if unknown else total + self.earlier_joules

    def spent(self, steps: int, reserve_seconds: float) -> Spent:
        meter = self.meter
        return Spent(steps, meter.tokens, meter.flops, meter.wall_seconds, meter.usd_total, reserve_seconds)

    def progress(self, steps: int, reserve_seconds: float) -> float:
        """How far the run is, from 0 to 1 at its end."""
        progress = self.limits.progress(self.spent(steps, reserve_seconds))
        # Clocks differ between ranks, and all must take the same step at the same rate or none.
        return float(self.runtime.from_main(progress)) if self.limits.uses_clock else progress

    def step_fraction(self, steps: int, tokens: int, reserve_seconds: float) -> float:
        """How much further a step of `tokens` will take the run; exact where counts end it, else judged by the mean."""
        now = self.spent(steps, reserve_seconds)
        seconds = self.meter.train_seconds / steps if steps else 0.0
        after = Spent(
            steps=steps + 1,
            tokens=now.tokens + tokens,
            flops=now.flops + tokens * self.flops_per_token,
            seconds=now.seconds + seconds,
            usd=None if now.usd is None else now.usd + (self.meter.usd(seconds) or 0.0),
            reserve_seconds=reserve_seconds,
        )
        fraction = self.limits.progress(after) - self.limits.progress(now)
        return float(self.runtime.from_main(fraction)) if self.limits.uses_clock else fraction

    def heartbeat(self, force: bool = False) -> None:
        if self.ledger:
            self.ledger.heartbeat(self.meter.attempt_wall_seconds, self.meter.attempt_train_seconds, force=force)

    def close(self, status: str) -> None:
        """End this attempt in the ledger with the clocks as they stand."""
        if self.ledger:
            self.heartbeat(force=True)
            self.ledger.finish(status)
