"""What a run spends: which device it is priced as, its meter, energy, limits and ledger, kept together.

The parts are in `cost/` and know nothing of training; here they are joined for one run on its devices and attempts.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
from datetime import date
from pathlib import Path
from typing import Any

import torch

from moe_train.compose import CONFIGS
from moe_train.config import PeakConfig, RunConfig
from moe_train.cost.attempt import RUNNING, Attempt
from moe_train.cost.budget import spent_by_others
from moe_train.cost.communication import Exchanged
from moe_train.cost.energy import EnergyMeter, Reading
from moe_train.cost.flops import recomputed_flops_per_token, training_flops_per_token
from moe_train.cost.hardware import detect
from moe_train.cost.ledger import Ledger
from moe_train.cost.meter import Meter, Work, process_start_seconds_ago
from moe_train.cost.peak import measured_matmul_tflops
from moe_train.cost.price import JOULES_PER_KWH, price_notes, price_of
from moe_train.cost.shared_ledger import SharedLedger
from moe_train.cost.utilization import Format, flops_by_format, ideal_seconds
from moe_train.precision.support import router_in_tf32
from moe_train.training.limits import Limits, Spent
from moe_train.training.runtime import Runtime


class Account:
    """The figures of one run. Only rank 0 has a ledger; the other ranks' clocks decide nothing."""

    def __init__(self, config: RunConfig, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        kind, name = runtime.device_type, runtime.device_name
        self.hardware, self.notes = detect(config.hardware, CONFIGS, kind, name, os.environ)
        self.price = price_of(self.hardware, config.cost, kind, runtime.num_threads)
        self.energy = EnergyMeter(
            kind,
            runtime.device.index or 0,
            watts=config.cost.watts,
            first_on_machine=os.environ.get("LOCAL_RANK", "0") == "0",
        )
        measured = self.energy.source is not None
        self.price_notes = price_notes(self.price, self.hardware.name, measured, date.today())
        self.notes += self.price_notes
        if self.energy.note and kind == "cuda" and not measured:
            self.notes.append(self.energy.note)
        priced = bool(self.price.usd_per_hour) and (measured or self.price.usd_per_kwh is None)
        rental = "hardware.price_usd_per_hour=…"
        owned = "cost.watts=…" if self.price.usd_per_hour else "hardware.purchase_usd=…"
        self.limits = Limits(config.stop, config.budget.usd, priced, rental if self.price.basis == "rental" else owned)
        self.peak: float | None = None
        self.peak_source: str | None = None
        self.earlier_joules: float | None = 0.0
        self.lost_seconds = 0.0
        self.earlier_hardware: list[str] = []  # other than this attempt's, that steps of the run were made on
        self.ledger: Ledger | None = None
        self._usd_of_others: float | None = None  # of the same sweep, when this attempt began
        self._train_joules: float | None = 0.0  # of this process's device
        self._window: Reading | None = None  # when the training in progress began
        self._closed = threading.Event()
        self.meter = self._new_meter(0.0, 0.0)

    def _new_meter(self, earlier_wall_seconds: float, earlier_usd: float | None) -> Meter:
        meter = Meter(
            price=self.price,
            num_devices=self.runtime.world_size,
            already_elapsed=process_start_seconds_ago(),
            earlier_wall_seconds=earlier_wall_seconds,
            earlier_usd=earlier_usd,
        )
        if self.energy.source is not None:  # what was drawn before is nobody's to know
            meter.read_energy(0.0, 0.0)
        return meter

    # ------------------------------------------------------------------------------------------------ the ledgers

    def open_ledger(self, run_folder: Path, checkpoint: dict[str, Any] | None) -> None:
        """Rank 0: take up the attempts made in this folder, and begin this one's line in both ledgers."""
        cost, tracking = self.config.cost, self.config.tracking
        shared = None if cost.ledger is None else SharedLedger(Path(cost.ledger))
        elapsed = process_start_seconds_ago()
        device_seconds = elapsed * self.runtime.world_size
        joules = None if self.energy.source is None else 0.0  # nobody counted before this
        attempt = Attempt(
            usd=self.price.usd(device_seconds, joules),
            usd_train=self.price.usd(0.0, joules),
            usd_energy=self.price.usd_of_energy(joules),
            run=str(run_folder),
            name=self.config.name,
            project=tracking.project,
            sweep=cost.sweep,
            claim=cost.claim,
            purpose=cost.purpose,
            config_hash=self.config.config_hash(),
            seed=self.config.seed,
            hardware=self.hardware.name,
            num_devices=self.runtime.world_size,
            num_threads=self.runtime.num_threads,
            basis=self.price.basis,
            price_usd_per_hour=self.price.usd_per_hour,
            price_source=self.price.source,
        )
        self.ledger = Ledger(run_folder / "ledger.json", attempt, shared, elapsed)
        self._usd_of_others = spent_by_others(cost, str(run_folder))
        self.meter = self._new_meter(self.ledger.earlier_wall_seconds, self.ledger.earlier_usd)
        kwh = self.ledger.earlier_kwh
        self.earlier_joules = None if kwh is None else kwh * JOULES_PER_KWH
        self.lost_seconds = self.ledger.lost_seconds(self.take_up(checkpoint))
        trained_on = {each.hardware for each in self.ledger.earlier if each.hardware and each.train_seconds}
        self.earlier_hardware = sorted(trained_on - {self.hardware.name}) if checkpoint else []
        if self.earlier_hardware:
            self.notes.append(
                f"earlier attempts were on {', '.join(self.earlier_hardware)}: seconds and tokens/s of the whole run "
                f"are not those of {self.hardware.name}"
            )
        threading.Thread(target=self._beat, name="ledger", daemon=True).start()

    def _beat(self) -> None:
        """Every second, so that a killed process is known to a second: a step or an evaluation can take minutes."""
        while not self._closed.wait(Ledger.HEARTBEAT_SECONDS):
            try:
                self.heartbeat()
            except OSError as error:  # a full disk ends the run where it saves, not here
                sys.stderr.write(f"note: the ledger could not be written ({error.strerror}); trying again\n")
                self._closed.wait(60)

    def heartbeat(self, force: bool = False) -> None:
        if self.ledger:
            meter, joules = self.meter, self.meter.joules_until_now()
            self.ledger.heartbeat(
                meter.attempt_wall_seconds,
                meter.attempt_train_seconds,
                force=force,
                tokens=meter.attempt_tokens,
                energy_kwh=None if joules is None else joules / JOULES_PER_KWH,
                usd=meter.attempt_usd,
                usd_train=meter.attempt_usd_train,
                usd_energy=meter.attempt_usd_of_energy,
            )

    def close(self, status: str) -> None:
        """End this attempt in the ledgers with the clocks as they stand, which stand still from here on."""
        if not self._closed.is_set():
            self.meter = self.meter.stopped()
            self._closed.set()
        if self.ledger and self.ledger.attempt.status == RUNNING:
            self.heartbeat(force=True)
            self.ledger.finish(status)

    # --------------------------------------------------------------------------------------- work, state and energy

    def set_work(self, vocab_size: int, fp8_products_in: Format | None = None) -> None:
        """What a token takes, known once the vocabulary is, and in what products rounded to FP8 are multiplied."""
        config, model = self.config, self.config.model.resolved()
        shape = (model, config.data.sequence_length, vocab_size)
        compute: Format = "bfloat16" if self.runtime.dtype is torch.bfloat16 else "float32"
        router: Format = "tensorfloat32" if router_in_tf32(self.runtime.device, self.runtime.dtype) else "float32"
        peaks = self._peaks(compute, needs_float32=model.moe is not None or fp8_products_in == "float32")
        self.meter.work = Work(
            flops=training_flops_per_token(*shape),
            recomputed_flops=recomputed_flops_per_token(*shape) if config.activation_checkpointing else 0.0,
            ideal_seconds=ideal_seconds(flops_by_format(*shape, compute, fp8_products_in, router), peaks),
            peak_tflops=self.peak,
        )

    def formats_changed(self) -> None:
        """Some of the products went on in another format: no ideal time is that of all tokens, so none is given."""
        self.meter.work = dataclasses.replace(self.meter.work, ideal_seconds=None)

    def _peaks(self, linear: Format, needs_float32: bool) -> PeakConfig:
        """The rates utilisation is measured against: the hardware file's; a CPU's are measured, as none is printed."""
        peaks = self.hardware.peak_tflops
        self.peak = getattr(peaks, linear)
        if self.peak is None and self.runtime.device_type == "cpu":
            device = self.runtime.device
            self.peak = measured_matmul_tflops(device, self.runtime.dtype)
            self.peak_source = f"{self.peak:.3f} TFLOP/s, {linear} matrix product measured at the start"
            if linear == "float32":
                return PeakConfig(bfloat16=None, float8=None, float32=self.peak)
            wide = measured_matmul_tflops(device, torch.float32, seconds=0.1) if needs_float32 else None
            return PeakConfig(bfloat16=self.peak, float8=None, float32=wide)
        if self.peak is not None:
            self.peak_source = f"{self.peak:g} TFLOP/s {linear}, {self.hardware.specification_source}"
        return peaks

    def take_up(self, checkpoint: dict[str, Any] | None) -> float:
        """Go on counting from a checkpoint's state, or from nothing; returns the train seconds it holds."""
        if checkpoint is None:
            return 0.0
        self.meter.load_state_dict(checkpoint["meter"])
        return self.meter.train_seconds

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"meter": self.meter.state_dict()}

    def training_begins(self) -> None:
        """Before a step: what is drawn from here to `training_pauses` is training's, as far as its clock runs."""
        if self._window is None:
            self._window = self._read(self.energy.joules() or 0.0)

    def _read(self, joules: float) -> Reading:
        return Reading(joules, self.meter.attempt_wall_seconds, self.meter.attempt_train_seconds)

    def training_pauses(self, briefly: bool = False) -> None:
        """After the last step before something else, the device synchronised. All ranks call it.

        `briefly`: for a row of the log alone, after which the counter is not read again: that can take milliseconds.
        What the row drew is then told by the clocks.
        """
        joules = self.energy.joules()
        if joules is None or self._train_joules is None:
            self._train_joules = None
        elif self._window is not None:
            self._train_joules += self._window.drawn_in_training(self._read(joules))
        self._window = self._read(joules) if briefly and joules is not None else None
        self._sum_energy(joules)

    def read_energy(self) -> None:
        """Of all devices. All ranks call it."""
        self._sum_energy(self.energy.joules())

    def _sum_energy(self, joules: float | None) -> None:
        mine = (joules, self._train_joules)
        unknown = float(any(joules is None for joules in mine))
        known = torch.tensor([*(joules or 0.0 for joules in mine), unknown], dtype=torch.float64)
        total, training, missing = self.runtime.summed(known.to(self.runtime.device)).tolist()
        self.meter.read_energy(None if missing else total, None if missing else training)

    def read_communication(self) -> None:
        """What processes exchanged since the last call, on the meter. The device has been waited for; all ranks call
        it."""
        communication = self.runtime.communication
        if communication is not None:
            mine = torch.tensor(communication.take().numbers(), dtype=torch.float64)
            means = self.runtime.summed(mine.to(self.runtime.device)).tolist()
            self.meter.exchange(Exchanged.of(means, self.runtime.world_size))

    def joules(self) -> float | None:
        """Energy of all devices and attempts until now; None if one of them was not measured."""
        joules = self.meter.joules_until_now()
        return None if joules is None or self.earlier_joules is None else joules + self.earlier_joules

    def of_sweep(self, own: float | None) -> dict[str, float | None]:
        """For the log, what the sweep has cost: `own`, and its other runs as they stood when this attempt began."""
        if self.config.cost.sweep is None:
            return {}
        others = self._usd_of_others
        return {"cost/usd_sweep": None if own is None or others is None else own + others}

    # ----------------------------------------------------------------------------------------------------- limits

    def spent(self, steps: int, reserve_seconds: float) -> Spent:
        meter = self.meter
        reserve_usd = meter.usd_ahead(reserve_seconds)
        return Spent(
            steps, meter.tokens, meter.flops, meter.wall_seconds, meter.usd_total, reserve_seconds, reserve_usd
        )

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
            flops=now.flops + tokens * self.meter.work.flops,
            seconds=now.seconds + seconds,
            usd=None if now.usd is None else now.usd + self.meter.usd_ahead(seconds),
            reserve_seconds=reserve_seconds,
            reserve_usd=now.reserve_usd,
        )
        fraction = self.limits.progress(after) - self.limits.progress(now)
        return float(self.runtime.from_main(fraction)) if self.limits.uses_clock else fraction

    def seconds_left(self, reserve_seconds: float) -> float | None:
        """Until a limit of seconds or dollars, less a reserve; None where there is none. Rank 0's, on every rank."""
        if not self.limits.uses_clock:
            return None
        left = self.limits.seconds_left(self.spent(0, reserve_seconds), self.meter.usd_ahead(1.0))
        return float(self.runtime.from_main(left))
