"""One training run from configuration to summary: what is set up in which order, the loop, and how it ends.

    runtime → run folder → data → model → optimizers → account → [step, log, evaluate, checkpoint]… → summary

Everything a step does is in step.py; what it costs is account.py's; where figures go is the tracker's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import time
from pathlib import Path

import torch

from moe_train.config import RunConfig, model_digest, to_dict
from moe_train.cost.attempt import FAILED, FINISHED
from moe_train.data.batches import Batches
from moe_train.data.packing import PreparedData, prepare
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import UserError
from moe_train.model.transformer import Transformer
from moe_train.parallel.agreement import check_same_text_everywhere
from moe_train.parallel.sharded import Sharded
from moe_train.parallel.signs_of_life import FailedAlone, LostProcesses, SignsOfLife, is_of_the_network
from moe_train.precision import recipes
from moe_train.tracking.console import print_notes
from moe_train.tracking.progress import Progress, check_console, open_progress
from moe_train.tracking.tracker import Tracker
from moe_train.training import metrics
from moe_train.training import summary as summaries
from moe_train.training.account import Account
from moe_train.training.checkpoints import Checkpoint, load_weights
from moe_train.training.closing import Closing
from moe_train.training.evaluation import Evaluation
from moe_train.training.fp8_health import Fp8Health, precision_notes, where_not_finite
from moe_train.training.optimizers import build_optimizers
from moe_train.training.run_folder import MAY_CHANGE_ON_RESUME, RunFolder, open_run_folder, write_keeping
from moe_train.training.runtime import Runtime, start_runtime
from moe_train.training.saving import Saving
from moe_train.training.schedules import lr_factor
from moe_train.training.sharded_checkpoints import Saver, Spreading, load_spread_optimizers
from moe_train.training.signals import Interruption
from moe_train.training.starting_weights import check_same_shape, check_same_text, check_same_tokenizer
from moe_train.training.step import StepFigures, Stepper


def train(config: RunConfig) -> None:
    """Make the run `config` describes, or go on with it, and write its folder. Raises UserError."""
    # Process groups are left as they are, for the process to end with (train.py): taking them apart joins threads of
    # gloo's, and once in a few dozen runs one of them did not wake up.
    runtime = start_runtime(config)
    folder = _open_folder(config, runtime)
    if folder is not None and folder.finished_summary is not None:
        print_notes(["this run is finished already: nothing is done"])
        summaries.show(folder.finished_summary, folder.path, None)
    if runtime.from_main(folder is not None and folder.finished_summary is not None):
        return
    path: Path = runtime.from_main(folder.path if folder else None)
    checkpoint: Checkpoint | None = runtime.from_main(folder.checkpoint if folder else None)
    signs = SignsOfLife(path, runtime.rank) if runtime.world_size > 1 else None
    account: Account | None = None
    try:
        account = Account(config, runtime)
        if folder is not None:
            account.open_ledger(path, checkpoint.state if checkpoint else None)
        run = Run(config, runtime, folder, account, path, checkpoint, signs)
    except BaseException as error:
        if account is not None:
            account.close(FAILED)
        if signs is not None:
            signs.failed(error)
            if is_of_the_network(error):  # another failed alone: the folder stays, since its log says why
                raise LostProcesses(signs, runtime.world_size, checkpoint.step if checkpoint else None) from error
            if isinstance(error, Exception) and signs.failed_alone():
                raise FailedAlone(signs, error) from error
        if folder is not None:
            folder.discard()
        raise
    try:
        run.train()
    except BaseException as error:
        run.abandon()
        if run.signs is not None:
            run.signs.failed(error)
            if is_of_the_network(error):
                raise LostProcesses(run.signs, runtime.world_size, run.saving.saved_step) from error
        raise
    if run.interrupted is not None:
        run.interruption.hand_on()
        raise summaries.Interrupted(run.interrupted, run.steps_done)


def _open_folder(config: RunConfig, runtime: Runtime) -> RunFolder | None:
    """Rank 0 opens the folder; if it cannot, all ranks end rather than wait for it."""
    folder, failure = None, None
    if runtime.is_main:
        try:
            check_console(config.tracking.console)
            folder = open_run_folder(config)
        except UserError as error:
            failure = error
    failure = runtime.from_main(failure)
    if failure is not None:
        raise failure
    return folder


class Run:
    """A run in progress. `folder` is rank 0's; the other ranks have none and write nothing."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        folder: RunFolder | None,
        account: Account,
        path: Path,
        checkpoint: Checkpoint | None,
        signs: SignsOfLife | None,
    ) -> None:
        self.config, self.runtime, self.account = config, runtime, account
        self.path, self.signs = path, signs
        used_otherwise: list[str] = []
        start: Checkpoint | None = runtime.from_main(folder.start if folder else None)

        self.data = prepare(config.data, progress=runtime.is_main)
        if runtime.world_size > 1:
            check_same_text_everywhere(self.data.fingerprint)
        self.batches = Batches(
            self.data.train, config.data.sequence_length, config.batch_size, config.seed, config.batch_ramp
        )
        self.model_config = config.model.resolved()
        vocab_size = vocabulary(config, self.data)

        self.model = Transformer(self.model_config, vocab_size, config.z_loss_weight, config.activation_checkpointing)
        if checkpoint is not None:
            check_same_text(checkpoint, self.data)
            load_weights(checkpoint, self.model)
        elif start is not None:
            check_same_tokenizer(start, self.data)
            used_otherwise = check_same_shape(start, self.model_config)
            load_weights(start, self.model)
        else:
            self.model.initialise(config.seed)
        products = recipes.apply(self.model, config.precision, runtime.device)
        account.set_work(vocab_size, None if products is None else products.backend.multiplies_in)
        self.compute_format = str(runtime.dtype).removeprefix("torch.")
        self.fp8_health = Fp8Health(
            config.precision, self.model, runtime.device, self.compute_format, checkpoint.state if checkpoint else None
        )
        if self.fp8_health.in_compute_format:
            account.formats_changed()
        self.spread, part = runtime.spread_out(self.model)
        self.optimizers = build_optimizers(
            self.model,
            config.optimizer,
            config.seed,
            local=self.spread.local,
            whole=self.spread.whole_matrices,
            part=part,
        )
        spreading = Spreading(self.model, self.spread, self.optimizers)
        saver: Saver | None = None
        if isinstance(self.spread, Sharded):
            runtime.accelerator.wait_for_everyone()
            if self.signs is not None:
                self.signs.check_shared()
            saver = Saver(self.path, spreading, runtime.new_host_group(), config.checkpoint.keep_last)
        self.stepper = Stepper(
            config, runtime, self.model, self.spread, self.optimizers, self.batches, self.fp8_health.counts
        )

        notes = [*runtime.notes, *self.account.notes]
        if products is not None:
            notes.append(products.note)
        if self.fp8_health.in_compute_format:
            wide = ", ".join(self.fp8_health.in_compute_format)
            notes.append(f"FP8: these modules went back to {self.compute_format} earlier and stay there: {wide}")
        self.steps_done = 0
        self.train_loss: float | None = None
        self.last_row: metrics.Metrics = {}
        resumed = None
        if checkpoint is not None:
            load_spread_optimizers(checkpoint, spreading)
            resumed = checkpoint.state
            self.steps_done = checkpoint.step
            self.train_loss = resumed["train_loss"]
            notes.append(f"going on from step {self.steps_done:,} of {self.path}")
            notes += precision_notes(folder.precision_before if folder else None, config.precision, checkpoint.state)
        elif start is not None:
            notes.append(f"starting from the weights of {start.path}")
            if used_otherwise:
                notes.append(f"not as its model had it: {', '.join(used_otherwise)}")
        moe = self.model_config.moe
        if moe is not None and moe.routing == "expert_choice":
            notes.append(
                "experts choose tokens, looking at later ones too: losses are lower than predictions would earn"
            )
        if folder is None:  # rank 0 has done so with its ledger
            account.take_up(resumed)
        if folder is not None and not folder.fresh and checkpoint is None:
            notes.append(f"{self.path} has no checkpoint: the run starts again from its first step")

        self.evaluation: Evaluation | None = None
        self.closing = Closing(config, runtime, account, self.model, self.data, self.stepper.micro_batch_size)
        self.saving = Saving(
            self.path,
            runtime,
            self.model,
            self.optimizers,
            self.closing,
            saver,
            keep_last=config.checkpoint.keep_last,
            step=self.steps_done if resumed else None,
        )
        self.startup_seconds = 0.0  # of this attempt, until its first step
        self.interruption = Interruption(alone=runtime.world_size == 1)
        self.stopped_by: str | None = None  # the limit that did
        self.tracker: Tracker | None = None
        if runtime.is_main:
            with self.closing.timing_the_tracker():
                self.tracker = self._start_tracker()
            self._write_formats()
            (self.path / "tokenizer").mkdir(exist_ok=True)
            Tokenizer.load(self.data.path).save(self.path / "tokenizer")
            print_notes([*notes, f"run folder {self.path}"])

    def _write_formats(self) -> None:
        """Rank 0: `precision.json`, what runs in what."""
        formats = recipes.table(self.model, self.config.precision, self.compute_format)
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
            meter.data_wait(time.monotonic() - began)
            counts = self._will_log(progress + fraction)
            with self.runtime.exchanges_counted(timed=counts):
                tokens = self.stepper.step(self.steps_done, inputs, targets, factor, progress, counts_fp8=counts)
                self.interruption.agree(self.runtime.hosts)
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
            self.account.training_pauses()
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
            "cost/energy_kwh": None if joules is None else joules / 3.6e6,
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
