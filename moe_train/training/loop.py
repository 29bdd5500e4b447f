"""The loop of a run: a step and what is due after it, until a limit is reached or a signal ends it; then its summary.

    [step, log, evaluate, checkpoint]… → summary

Everything a step does is in step.py; what it costs is account.py's; where figures go is the tracker's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import time

import torch

from moe_train.config import RunConfig, model_digest, to_dict
from moe_train.cost.attempt import FAILED, FINISHED
from moe_train.cost.price import JOULES_PER_KWH
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import UserError
from moe_train.precision import recipes
from moe_train.tracking.console import print_notes
from moe_train.tracking.progress import Progress, open_progress
from moe_train.tracking.tracker import Tracker
from moe_train.training import metrics
from moe_train.training import summary as summaries
from moe_train.training.account import Account
from moe_train.training.closing import Closing
from moe_train.training.evaluation import Evaluation
from moe_train.training.fp8_health import where_not_finite
from moe_train.training.pace import pace_of
from moe_train.training.parts import Shared, put_together
from moe_train.training.run_folder import MAY_CHANGE_ON_RESUME, RunFolder, write_keeping
from moe_train.training.runtime import Runtime
from moe_train.training.saving import Saving
from moe_train.training.schedules import lr_factor
from moe_train.training.signals import Interruption
from moe_train.training.step import StepFigures


class Run:
    """A run in progress. `folder` is rank 0's; the other ranks have none and write nothing."""

    def __init__(
        self, config: RunConfig, runtime: Runtime, folder: RunFolder | None, account: Account, shared: Shared
    ) -> None:
        self.config, self.runtime, self.account = config, runtime, account
        parts = put_together(config, runtime, folder, account, shared)
        self.interruption = Interruption(alone=runtime.world_size == 1)
        self.interruption.listen()
        self.path, self.signs, self.data, self.batches = shared.path, shared.signs, parts.data, parts.batches
        self.model, self.model_config, self.compute_format = parts.model, parts.model_config, parts.compute_format
        self.fp8_health, self.stepper = parts.fp8_health, parts.stepper
        self.steps_done, self.train_loss = parts.step or 0, parts.train_loss
        self._pace = pace_of(runtime.device_type, account.limits.uses_clock)
        self.last_row: metrics.Metrics = {}
        self.evaluation: Evaluation | None = None
        self.closing = Closing(config, runtime, account, self.model, self.data, self.stepper.micro_batch_size)
        self.saving = Saving(
            self.path,
            runtime,
            self.model,
            parts.optimizers,
            self.closing,
            parts.saver,
            keep_last=config.checkpoint.keep_last,
            step=parts.step,
        )
        self.startup_seconds = 0.0  # of this attempt, until its first step
        self.stopped_by: str | None = None  # the limit that did
        self.tracker: Tracker | None = None
        if runtime.is_main:
            with self.closing.timing_the_tracker():
                self.tracker = self._start_tracker()
            self._write_formats()
            (self.path / "tokenizer").mkdir(exist_ok=True)
            Tokenizer.load(self.data.path).save(self.path / "tokenizer")
            print_notes([*parts.notes, f"run folder {self.path}"])

    def _write_formats(self) -> None:
        """Rank 0: `precision.json`, what runs in what."""
        formats = recipes.table(self.model, self.runtime.dtype, self.runtime.device)
        write_keeping(self.path / "precision.json", json.dumps(formats, indent=1, ensure_ascii=False) + "\n")

    def _start_tracker(self) -> Tracker:
        has_metrics = (self.path / "metrics.jsonl").exists()
        # The same after a resume, which may move the run's end.
        run_id = self.config.config_hash(without=MAY_CHANGE_ON_RESUME)
        run_id = re.sub(r"[^\w-]", "_", f"{run_id}-{self.path.name}", flags=re.ASCII)[:64]
        last_step = self.steps_done if has_metrics else None
        tracking, cost = self.config.tracking, self.config.cost
        tracking = dataclasses.replace(tracking, group=tracking.group or cost.claim or cost.sweep)
        settings = to_dict(self.config) | {"resolved": summaries.resolved(self)}
        return Tracker(self.path, tracking, settings, self.config.name, run_id, resume_step=last_step)

    @property
    def interrupted(self) -> int | None:
        """The signal that ended the run."""
        return self.interruption.signal

    # -------------------------------------------------------------------------------------------------- the loop

    def train(self) -> None:
        """Step until a limit is reached or a signal ends it, then evaluate, save and sum up."""
        title = f"{self.config.name}, seed {self.config.seed}, {self.account.hardware.name}"
        display = open_progress(self.config.tracking.console, title) if self.runtime.is_main else None
        with self.interruption.noted(), display or contextlib.nullcontext():
            progress = self._progress()
            if progress >= 1 and not self.steps_done and self.account.limits.uses_clock:
                raise UserError(f"{self._limit_reached()} was used up before the first step: raise it")
            self.stopped_by = self._limit_reached()
            self.startup_seconds = self.account.meter.attempt_wall_seconds
            while progress < 1 and self.interrupted is None:
                progress = self._step(progress, display)
            if self.saving.asked_step != self.steps_done:  # a signal came after the step had decided not to save
                self._save()
            self.saving.take_note(wait=True)
        self._finish()
        self.runtime.accelerator.wait_for_everyone()  # a launcher ends rank 0 as soon as another has ended otherwise

    def _step(self, progress: float, display: Progress | None) -> float:
        """One optimizer step and what is due after it; returns the run's progress."""
        config, meter = self.config, self.account.meter
        tokens_before = meter.tokens
        self.account.training_begins()
        with meter.training():
            fraction = self.account.step_fraction(
                self.steps_done, self.batches.num_targets(self.steps_done), self.closing.reserve_seconds()
            )
            factor = lr_factor(config.schedule, progress, fraction)
            began = time.monotonic()
            inputs, targets = self.stepper.load(self.steps_done)
            meter.data_wait(time.monotonic() - began if self.stepper.device_waited else 0.0)
            counts = self._will_log(progress + fraction)
            with self.runtime.exchanges_counted(timed=counts):
                tokens = self.stepper.step(self.steps_done, inputs, targets, factor, progress, counts_fp8=counts)
                self.interruption.agree(self.runtime.hosts)
            if self._pace is not None:
                self._pace.follow()
            meter.add_tokens(tokens)
            self.steps_done += 1
            progress = self._progress()
            self.stopped_by = self._limit_reached()  # now: the reserve changes once the evaluation is timed
            ends = progress >= 1 or self.interrupted is not None
            crossed = self._crossed(config.eval.every_tokens, tokens_before, meter.tokens)
            evaluates = self.interrupted is None if ends else crossed and self.closing.leaves_time_for_another()
            every = config.checkpoint.every_steps
            rehearses = not ends and self.closing.rehearsal_is_due()
            saves = ends or rehearses or (every is not None and self.steps_done % every == 0)
            # Every checkpoint is logged: its loss is known to be finite, and a resumed run's averages begin with it.
            logs = saves or evaluates or self.steps_done % config.tracking.log_every_steps == 0
            if self.runtime.device_type == "cuda" and logs:
                torch.cuda.synchronize()  # what the device still has to do belongs on the train clock
        too_unhealthy: str | None = None
        if logs:
            self.account.training_pauses(briefly=not (evaluates or saves))
            figures = self._training_figures()
            too_unhealthy = self._look_after_fp8(figures, ends)
            row = self.last_row = self._training_metrics(figures, factor)
            if evaluates:
                row |= self._evaluate()
            if self.tracker:
                self.tracker.log(self.steps_done, row)
            if display is not None:
                reserve = self.closing.reserve_seconds()
                display.update(
                    min(progress, 1.0),
                    step=self.steps_done,
                    row=row,
                    usd=meter.usd_total,
                    usd_ahead=lambda seconds: meter.usd_ahead(seconds + reserve),
                )
        if saves or too_unhealthy is not None:
            self._save()
        self.saving.take_note(wait=too_unhealthy is not None)
        if too_unhealthy is not None:
            raise UserError(
                f"{too_unhealthy} (step_{self.steps_done} is saved): go on with resume=auto and precision=bf16, "
                "precision.health.action=compute_format or a higher limit"
            )
        if rehearses:
            self.closing.rehearse()
        return progress

    def _will_log(self, progress: float) -> bool:
        """Whether the step about to be done will be logged, as far as can be told: it takes the run to `progress`."""
        every = (self.config.tracking.log_every_steps, self.config.checkpoint.every_steps)
        tokens = self.account.meter.tokens
        after = tokens + self.batches.num_targets(self.steps_done)
        return (
            any(steps is not None and (self.steps_done + 1) % steps == 0 for steps in every)
            or self._crossed(self.config.eval.every_tokens, tokens, after)
            or progress > 1 - 1e-9
        )

    def _progress(self) -> float:
        return self.account.progress(self.steps_done, self.closing.reserve_seconds())

    @staticmethod
    def _crossed(every_tokens: int | None, before: int, after: int) -> bool:
        return every_tokens is not None and after // every_tokens > before // every_tokens

    def _limit_reached(self) -> str | None:
        return self.account.limits.reason(self.account.spent(self.steps_done, self.closing.reserve_seconds()))

    # ------------------------------------------------------------------------------------------ logging and saving

    def _training_figures(self) -> StepFigures:
        """Of the steps since the last log. Waits for the device. Raises UserError where they are not finite."""
        figures = self.stepper.read_totals()
        self.train_loss = figures.loss
        if not (math.isfinite(figures.loss) and math.isfinite(figures.grad_norm)):
            saved = (
                "there is no checkpoint yet"
                if self.saving.saved_step is None
                else f"step_{self.saving.saved_step} is saved"
            )
            place = where_not_finite(figures.fp8_rates)
            raise UserError(
                f"the loss is {figures.loss} and the gradient norm {figures.grad_norm} at step {self.steps_done}"
                + (f", in FP8 first {place}" if place else "")
                + f" ({saved}): lower optimizer.lr or raise schedule.warmup_fraction"
            )
        return figures

    def _look_after_fp8(self, figures: StepFigures, ends: bool) -> str | None:
        """Do what is to be done about the rates of a logged step; returns why the run has to stop, if it has to."""
        verdict = self.fp8_health.judge(figures.fp8_rates, self.steps_done, ends)
        if verdict.returned:
            self.account.formats_changed()
        if self.tracker:
            if verdict.returned:
                self._write_formats()
            print_notes(verdict.notes)
        return verdict.stop

    def _training_metrics(self, figures: StepFigures, factor: float) -> dict[str, float | None]:
        """Everything that is logged of the steps since the last log."""
        in_compute_format = float(len(self.fp8_health.in_compute_format))
        joules = self.account.joules()  # read when training paused
        self.account.read_communication()
        window = self.account.meter.window()
        return {
            **metrics.of_steps(figures, self.model_config.moe),
            **metrics.of_fp8(figures.fp8_rates),
            **({"fp8/modules_in_compute_format": in_compute_format} if self.config.precision.fp8 else {}),
            "train/lr": self.config.optimizer.lr * factor,
            "memory/peak_bytes": float(summaries.peak_memory_bytes(self.runtime)),
            "progress/seconds": self.account.meter.wall_seconds,
            "cost/energy_kwh": None if joules is None else joules / JOULES_PER_KWH,
            **self.account.of_sweep(window["cost/usd_total"]),
            **window,
        }

    def _evaluate(self) -> metrics.Metrics:
        """The whole validation split, or as much of it as a limit in seconds or dollars leaves time for."""
        self.evaluation = self.closing.evaluate(self.config.eval.max_tokens)
        if self.tracker and not (self.evaluation and self.evaluation.complete):
            seen = "nothing" if self.evaluation is None else f"the first {self.evaluation.tokens:,} tokens"
            print_notes([f"the limit left time to evaluate {seen} of the validation split"])
        return {} if self.evaluation is None else metrics.of_evaluation(self.evaluation, self.account.meter.usd_total)

    def _save(self) -> None:
        state = {
            "step": self.steps_done,
            **self.account.state(),
            **self.fp8_health.state(),
            "train_loss": self.train_loss,
            "corpus_fingerprint": self.data.fingerprint,
            "vocab_size": self.model.vocab_size,
            "config_hash": self.config.config_hash(),
            "model_digest": model_digest(self.config.model),
        }
        self.saving.save(state)

    def abandon(self) -> None:
        """Close the books of a run that failed; its checkpoints stay."""
        if self.tracker:
            self.tracker.finish({"status": "failed"})
        self.account.close(FAILED)

    def _finish(self) -> None:
        if self.interrupted is None and self.evaluation is None:
            self._evaluate()  # resumed at its very end: there was no step to evaluate after
        status = FINISHED if self.interrupted is None else "interrupted"
        if status == FINISHED and (self.stopped_by or "").startswith("budget.usd"):
            status = "out_of_budget"
        self.account.read_energy()
        left = self.account.seconds_left(0.0)
        if self.tracker is None:
            return
        self.tracker.finish(summaries.build(self, status), seconds_left=left)
        self.account.close(status)
        summary = summaries.build(self, status)  # the time wandb took is paid too
        summaries.write(self.path, summary)
        summaries.show(summary, self.path, self.tracker.wandb_location)
