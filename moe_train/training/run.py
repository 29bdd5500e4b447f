"""One training run from configuration to summary: what is set up in which order, the loop, and how it ends.

    runtime → run folder → data → model → optimizers → meter → [step, log, evaluate, checkpoint]… → summary

Everything a step does is in step.py; what it costs is the meter's; where figures go is the tracker's.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moe_train.compose import CONFIGS
from moe_train.config import RunConfig, to_dict
from moe_train.cost.energy import EnergyMeter
from moe_train.cost.flops import training_flops_per_token
from moe_train.cost.hardware import detect, price_per_device
from moe_train.cost.ledger import Ledger
from moe_train.cost.meter import Meter, process_start_seconds_ago
from moe_train.cost.peak import measured_matmul_tflops
from moe_train.data.batches import Batches
from moe_train.data.packing import PreparedData, prepare
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import UserError
from moe_train.model.balancing import load_statistics
from moe_train.model.transformer import Transformer
from moe_train.tracking.console import TrainingProgress, print_notes
from moe_train.tracking.tracker import Tracker
from moe_train.training import summary as summaries
from moe_train.training.checkpoints import load_optimizers, load_weights, save_checkpoint
from moe_train.training.evaluation import Evaluation, evaluate
from moe_train.training.limits import Limits, Spent
from moe_train.training.optimizers import build_optimizers
from moe_train.training.run_folder import RunFolder, open_run_folder
from moe_train.training.runtime import Runtime, start_runtime
from moe_train.training.schedules import lr_factor
from moe_train.training.step import Stepper


def train(config: RunConfig) -> None:
    """Make the run `config` describes, or go on with it, and write its folder. Raises UserError."""
    elapsed = process_start_seconds_ago()
    began = time.monotonic()
    runtime = start_runtime(config)
    try:
        folder = _open_folder(config, runtime)
        if folder is not None and folder.finished_summary is not None:
            print_notes(["this run is finished already: nothing is done"])
            summaries.show(folder.finished_summary, folder.path, None)
        already_done = runtime.from_main(folder is not None and folder.finished_summary is not None)
        if not already_done:
            try:
                run = Run(config, runtime, folder, elapsed + time.monotonic() - began)
            except BaseException:
                if folder is not None:
                    folder.discard()
                raise
            try:
                run.train()
            except BaseException:
                run.abandon()
                raise
            if run.interrupted is not None:
                raise summaries.Interrupted(run.interrupted, run.steps_done)
    finally:
        runtime.accelerator.end_training()


def _open_folder(config: RunConfig, runtime: Runtime) -> RunFolder | None:
    """Rank 0 opens the folder; if it cannot, all ranks end rather than wait for it."""
    folder, failure = None, None
    if runtime.is_main:
        try:
            folder = open_run_folder(config)
        except UserError as error:
            failure = error
    failure = runtime.from_main(failure)
    if failure is not None:
        raise failure
    return folder


class Run:
    """A run in progress. `folder` is rank 0's; the other ranks have none and write nothing."""

    def __init__(self, config: RunConfig, runtime: Runtime, folder: RunFolder | None, elapsed: float) -> None:
        self.config, self.runtime, self.folder = config, runtime, folder
        self.path: Path = runtime.from_main(folder.path if folder else None)
        checkpoint = runtime.from_main(folder.checkpoint if folder else None)
        continues = runtime.from_main(folder.continues if folder else False)

        hardware, notes = detect(config.hardware, CONFIGS, runtime.device_type, runtime.device_name)
        self.hardware = hardware
        self.price = price_per_device(hardware, runtime.device_type, runtime.num_threads)
        self.limits = Limits(config.stop, None if self.price is None else self.price * runtime.world_size / 3600)
        self.energy = EnergyMeter(runtime.device_type, runtime.device.index or 0)
        self.earlier_joules = 0.0
        notes = [*runtime.notes, *notes, *([self.energy.note] if self.energy.note and hardware.match else [])]

        self.data = self._prepare_data()
        self.batches = Batches(self.data.train, config.data.sequence_length, config.batch_size, config.seed)
        self.model_config = config.model.resolved()
        vocab_size = vocabulary(config, self.data)
        self.flops_per_token = training_flops_per_token(self.model_config, config.data.sequence_length, vocab_size)
        self.peak, self.peak_source = self._peak()

        self.model = Transformer(self.model_config, vocab_size, config.z_loss_weight)
        if checkpoint is None:
            self.model.initialise(config.seed)
        else:
            self._check_same_text(checkpoint.state)
            load_weights(checkpoint, self.model)
        self.model.to(runtime.device)
        self.optimizers = build_optimizers(self.model, config.optimizer)
        wrapped = runtime.accelerator.prepare(self.model)
        self.stepper = Stepper(config, runtime, self.model, wrapped, self.optimizers, self.batches)

        ledger_path = self.path / "ledger.json"
        self.ledger = Ledger(ledger_path, already_elapsed=elapsed) if runtime.is_main else None
        self.meter = Meter(
            price_usd_per_hour=self.price,
            num_devices=runtime.world_size,
            flops_per_token=self.flops_per_token,
            peak_tflops_per_device=self.peak,
            already_elapsed=process_start_seconds_ago(),
            earlier_wall_seconds=self.ledger.earlier_wall_seconds if self.ledger else 0.0,
        )
        self.steps_done = 0
        self.evaluation: Evaluation | None = None
        if checkpoint is not None and continues:
            load_optimizers(checkpoint, self.optimizers)
            self.steps_done = checkpoint.step
            self.meter.load_state_dict(checkpoint.state["meter"])
            self.earlier_joules = float(checkpoint.state["joules"] or 0.0)
            notes.append(f"going on from step {self.steps_done:,} of {self.path}")
        elif checkpoint is not None:
            notes.append(f"a new run from the weights of {checkpoint.path}")
        self.lost_seconds = self.ledger.lost_seconds(self.meter.train_seconds) if self.ledger else 0.0
        self.evaluation_seconds: float | None = None
        self.checkpoint_seconds = 0.0
        self.final_train_loss: float | None = checkpoint.state.get("train_loss") if checkpoint and continues else None
        self.interrupted: int | None = None
        self.tracker = self._start_tracker() if runtime.is_main else None
        if runtime.is_main:
            (self.path / "tokenizer").mkdir(exist_ok=True)
            Tokenizer.load(self.data.path).save(self.path / "tokenizer")
            print_notes([*notes, f"run folder {self.path}"])

    # ------------------------------------------------------------------------------------------------ setting up

    def _prepare_data(self) -> PreparedData:
        return prepare(self.config.data, progress=self.runtime.is_main)

    def _peak(self) -> tuple[float | None, str | None]:
        """The rate utilisation is measured against: the hardware file's; a CPU's is measured, since none is printed."""
        dtype = "bfloat16" if self.runtime.dtype is torch.bfloat16 else "float32"
        peak: float | None = getattr(self.hardware.peak_tflops, dtype)
        if peak is None and self.runtime.device_type == "cpu":
            peak = measured_matmul_tflops(self.runtime.device, self.runtime.dtype)
            return peak, f"{peak:.3f} TFLOP/s, {dtype} matrix product measured at the start"
        return peak, None if peak is None else f"{peak:g} TFLOP/s {dtype}, {self.hardware.peak_source}"

    def _check_same_text(self, state: dict[str, Any]) -> None:
        if state["corpus_fingerprint"] != self.data.fingerprint:
            raise UserError(
                "the checkpoint was trained on another text or tokenizer "
                f"(fingerprint {state['corpus_fingerprint'][:12]}, "
                f"here {self.data.fingerprint[:12]}): give the data.* settings it was trained with"
            )

    def _start_tracker(self) -> Tracker:
        has_metrics = (self.path / "metrics.jsonl").exists()
        return Tracker(
            self.path,
            self.config.tracking,
            to_dict(self.config),
            self.config.name,
            f"{self.config.config_hash()}-{self.path.name}"[:64],
            self.steps_done if has_metrics else None,
        )

    # -------------------------------------------------------------------------------------------------- the loop

    def train(self) -> None:
        config = self.config
        with (
            self._signals_end_the_run(),
            TrainingProgress() if self.runtime.is_main else contextlib.nullcontext() as bar,
        ):
            progress = self._progress()
            step_fraction = 0.0 if self.steps_done == 0 else progress / self.steps_done
            while progress < 1 and self.interrupted is None:
                if step_fraction == 0.0:
                    step_fraction = self._first_step_fraction()
                tokens_before = self.meter.tokens
                with self.meter.training():
                    waiting = time.monotonic()
                    inputs, targets = self.stepper.load(self.steps_done)
                    self.meter.data_wait(time.monotonic() - waiting)
                    factor = lr_factor(config.schedule, progress, step_fraction)
                    self.meter.add_tokens(self.stepper.step(self.steps_done, inputs, targets, factor))
                    self.steps_done += 1
                    logs = self.steps_done % config.tracking.log_every_steps == 0
                    if logs and self.runtime.device_type == "cuda":
                        torch.cuda.synchronize()
                before, progress = progress, self._progress()
                step_fraction = progress - before
                ends = progress >= 1 or self.interrupted is not None
                finishes = ends and self.interrupted is None
                evaluates = finishes or self._crosses(config.eval.every_tokens, tokens_before)
                if logs or evaluates or ends:
                    metrics = self._training_metrics(factor)
                    if evaluates:
                        metrics |= self._evaluate()
                    self._log(metrics)
                    if bar is not None:
                        bar.update(
                            min(progress, 1.0),
                            step=self.steps_done,
                            loss=self.final_train_loss,
                            tokens_per_second=metrics["throughput/tokens_per_second"],
                            usd=self.meter.usd_total,
                        )
                every = config.checkpoint.every_steps
                if ends or (every and self.steps_done % every == 0):
                    self._save()
        self._finish()

    def _spent(self) -> Spent:
        return Spent(
            steps=self.steps_done,
            tokens=self.meter.tokens,
            flops=self.meter.flops,
            seconds=self.meter.wall_seconds,
            usd=self.meter.usd_total,
            reserve_seconds=self._expected_evaluation_seconds() + self.checkpoint_seconds,
        )

    def _progress(self) -> float:
        progress = self.limits.progress(self._spent())
        # Clocks differ between ranks, and all must take the same step at the same rate or none.
        return float(self.runtime.from_main(progress)) if self.limits.uses_clock else progress

    def _first_step_fraction(self) -> float:
        """How far one step takes the run, as far as counts tell before the first one; used for its warm-up."""
        tokens = self.batches.num_targets(self.steps_done)
        return self.limits.progress(Spent(1, tokens, tokens * self.flops_per_token, 0.0, 0.0))

    def _expected_evaluation_seconds(self) -> float:
        if self.evaluation_seconds is not None:
            return self.evaluation_seconds
        if not self.meter.tokens:
            return 0.0
        tokens = min(len(self.data.val), self.config.eval.max_tokens or len(self.data.val))
        return tokens * self.meter.train_seconds / self.meter.tokens / 3  # a forward is a third of a step's work

    def _crosses(self, every_tokens: int | None, tokens_before: int) -> bool:
        return every_tokens is not None and self.meter.tokens // every_tokens > tokens_before // every_tokens

    @contextlib.contextmanager
    def _signals_end_the_run(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the step in progress, with a checkpoint. Of one process only, so far."""
        if self.runtime.world_size > 1:
            yield
            return

        def note(number: int, _frame: object) -> None:
            if self.interrupted is not None:  # asked twice: at once
                raise KeyboardInterrupt
            self.interrupted = number

        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    # ------------------------------------------------------------------------------------------ logging and saving

    def _training_metrics(self, factor: float) -> dict[str, float | None]:
        loss, grad_norm, counts_le = self.stepper.read_totals()
        self.final_train_loss = loss
        if loss != loss or loss == float("inf"):
            raise UserError(
                f"the loss is {loss} at step {self.steps_done}: lower optimizer.lr or raise schedule.warmup_fraction; "
                f"the last good checkpoint is in {self.path / 'checkpoints'}"
            )
        metrics: dict[str, float | None] = {
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "train/lr": self.config.optimizer.lr * factor,
            "memory/peak_bytes": float(summaries.peak_memory_bytes(self.runtime)),
        }
        metrics |= self.meter.window()
        joules = self._joules()
        metrics |= {
            "cost/energy_kwh": None if joules is None else joules / 3.6e6,
            "progress/seconds": self.meter.wall_seconds,
        }
        if self.model_config.moe is not None:
            metrics |= load_statistics(counts_le)
        return metrics

    def _joules(self) -> float | None:
        """Energy of all devices and of the attempts whose checkpoints were taken up; None if one cannot be read."""
        joules = self.energy.joules()
        known = torch.tensor([joules or 0.0, float(joules is None)], dtype=torch.float32, device=self.runtime.device)
        total, unknown = self.runtime.summed(known).tolist()
        return None if unknown else total + self.earlier_joules

    def _evaluate(self) -> dict[str, float | None]:
        began = time.monotonic()
        self.evaluation = evaluate(
            self.model,
            self.data,
            self.runtime,
            sequence_length=self.config.data.sequence_length,
            batch_size=self.stepper.micro_batch_size,
            max_tokens=self.config.eval.max_tokens,
        )
        self.evaluation_seconds = time.monotonic() - began
        return {"val/loss": self.evaluation.loss, "val/bits_per_byte": self.evaluation.bits_per_byte}

    def _log(self, metrics: dict[str, float | None]) -> None:
        if self.tracker:
            self.tracker.log(self.steps_done, metrics)
        if self.ledger:
            self.ledger.heartbeat(self.meter.attempt_wall_seconds, self.meter.attempt_train_seconds)

    def _save(self) -> None:
        began = time.monotonic()
        joules = self._joules()
        if self.runtime.is_main:
            state = {
                "step": self.steps_done,
                "meter": self.meter.state_dict(),
                "joules": joules,
                "train_loss": self.final_train_loss,
                "corpus_fingerprint": self.data.fingerprint,
                "vocab_size": self.model.vocab_size,
                "config_hash": self.config.config_hash(),
            }
            save_checkpoint(self.path, self.model, self.optimizers, state, self.config.checkpoint.keep_last)
        self.runtime.accelerator.wait_for_everyone()
        self.checkpoint_seconds = time.monotonic() - began

    def abandon(self) -> None:
        """Close the books of a run that failed; its checkpoints stay."""
        if self.tracker and self.ledger:
            self.tracker.finish({"status": "failed"})
            self.ledger.heartbeat(self.meter.attempt_wall_seconds, self.meter.attempt_train_seconds, force=True)
            self.ledger.finish("failed")

    def _finish(self) -> None:
        if self.interrupted is None and self.evaluation is None:
            self._evaluate()  # resumed at its very end: there was no step to evaluate after
        joules = self._joules()
        peak_memory = summaries.peak_memory_bytes(self.runtime)
        if not self.runtime.is_main or self.tracker is None or self.ledger is None:
            return
        status = "finished" if self.interrupted is None else "interrupted"
        summary = summaries.build(self, status, self.limits.reason(self._spent()), joules, peak_memory)
        location = self.tracker.wandb_location
        self.tracker.finish(summary)
        summary = summaries.build(
            self, status, summary["stopped_by"], joules, peak_memory
        )  # wandb's upload is paid too
        summaries.write(self.path, summary)
        self.ledger.heartbeat(self.meter.attempt_wall_seconds, self.meter.attempt_train_seconds, force=True)
        self.ledger.finish(status)
        summaries.show(summary, self.path, location)


def vocabulary(config: RunConfig, data: PreparedData) -> int:
    """The model's vocabulary: the tokenizer's rounded up to a multiple of 64, which matrix units like, or as given."""
    given = config.model.vocab_size
    if given is None:
        return -(-data.vocab_size // 64) * 64
    if given < data.vocab_size:
        raise UserError(
            f"model.vocab_size={given} is less than the tokenizer's {data.vocab_size}: raise it or leave it null"
        )
    return given
