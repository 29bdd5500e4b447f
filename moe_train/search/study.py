"""One study: trials that are asked for, begun by a worker and told how they ended; those of dead workers are taken up.

A trial is a run. Its hash is kept with it, so a search finds its runs again, and runs that grids or other searches have
made already cost it nothing.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

from moe_train.compose import compose_run
from moe_train.config import differences, to_dict
from moe_train.config.sweep import PruningConfig, SweepConfig
from moe_train.errors import UserError
from moe_train.search import space
from moe_train.search.storage import Worker
from moe_train.sweeps.job import Job
from moe_train.sweeps.metrics import Row, progress
from moe_train.sweeps.runs import is_divergence

MISTAKES_IN_A_ROW = 20  # of settings that cannot go together, after which the space itself is taken to be wrong
_METRIC = {"val_bits_per_byte": "val/bits_per_byte", "val_loss": "val/loss"}


@dataclass(frozen=True)
class Definition:
    """What the runs of a study have in common. `level`: its choice of for_each, with the overrides that makes."""

    name: str
    config: SweepConfig
    level: dict[str, Any]
    overrides: tuple[str, ...]
    settings: tuple[str, ...]  # of every job, no part of what it is
    config_dir: Path | None

    def registered(self) -> dict[str, Any]:
        """What must not change while trials are there."""
        left_out = ("question", "trials", "rule", "base", "for_each")  # the last two are in the settings
        content = {k: v for k, v in to_dict(self.config).items() if k not in left_out}
        own = dict(override.partition("=")[::2] for override in self.overrides)
        return {**content, "settings": own}


@dataclass(frozen=True)
class TrialJob(Job):
    study: Study | None = None
    trial: optuna.Trial | None = None


class Study:
    """Raises UserError where the file holds another search under this name."""

    def __init__(self, storage: optuna.storages.RDBStorage, definition: Definition, worker: Worker, out: Path) -> None:
        self.definition, self._worker = definition, worker
        self._asking = filelock.FileLock(out / ".asking.lock")  # workers agree on how many trials there are
        config = definition.config
        self._study = optuna.create_study(
            storage=storage,
            study_name=definition.name,
            directions=["minimize"] * len(config.objectives),
            pruner=_pruner(config.pruning),
            load_if_exists=True,
        )
        self._distributions = space.distributions(config.space)
        with self._asking:
            self._check_registered(out)
            if config.sampler == "grid":
                self._enqueue_grid()
        self._to_begin = self._left()

    def _enqueue_grid(self) -> None:
        """Every combination that no trial has, and those whose run failed for another reason than what it is."""
        known = {
            json.dumps(trial.params or trial.system_attrs.get("fixed_params"), sort_keys=True)
            for trial in self.trials()
            if not _may_do_better(trial)
        }
        for params in space.grid(self.definition.config.space):
            if json.dumps(params, sort_keys=True) not in known:
                self._study.enqueue_trial(params)

    def _sampler(self) -> optuna.samplers.BaseSampler:
        """One for each trial, seeded by its number: workers that start together would suggest the same otherwise.

        The first third of the trials, at most ten, is drawn at random, and trials that run are taken for bad ones, so
        that several at a time do not crowd in one place.
        """
        config = self.definition.config
        # Generators of neighbouring small seeds begin alike.
        seed = int(np.random.SeedSequence(len(self.trials())).generate_state(1)[0])
        if config.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        random = min(10, math.ceil((config.trials or 1) / 3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return optuna.samplers.TPESampler(n_startup_trials=random, constant_liar=True, seed=seed)

    def _check_registered(self, out: Path) -> None:
        now = json.loads(json.dumps(self.definition.registered()))
        before = self._study.user_attrs.get("definition")
        if before is None:
            self._study.set_user_attr("definition", now)
        for key, old, new in differences(before, now) if before is not None else []:
            name = key.removeprefix("settings.")
            was = f"without {name}={json.dumps(new)}" if old is None else f"with {name}={json.dumps(old)}"
            now_it_is = ", and now without it" if new is None else "" if old is None else f", not {json.dumps(new)}"
            raise UserError(f"the search in {out} was begun {was}{now_it_is}: restore it, or give another out=")

    def trials(self, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states or None)

    def _left(self) -> int:
        """How many trials are still to be begun, by anybody."""
        if self.definition.config.trials is None:
            return len(self.trials(TrialState.WAITING))
        begun = self.trials(TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        return max(0, self.definition.config.trials - len(begun))

    # ------------------------------------------------------------------------------------------------------- asking

    def taken_up(self) -> Iterator[TrialJob]:
        """Trials that a worker began and did not end, now this one's."""
        for frozen in self.trials(TrialState.RUNNING):
            with self._asking:
                if not self._worker.is_dead(frozen.user_attrs.get("worker")):
                    continue
                trial = optuna.Trial(self._study, frozen._trial_id)
                for key, distribution in self._distributions.items():  # what it has, and what it was killed before
                    trial._suggest(key, distribution)
                trial.set_user_attr("worker", self._worker.name)
            job = self._job(trial)
            if job is not None:
                yield job

    def ask(self) -> TrialJob | None:
        """The next trial that makes a run; None where enough are begun. Raises UserError where none does."""
        mistakes = 0
        while True:
            with self._asking:
                if self._to_begin <= 0 or self._left() <= 0:
                    return None
                self._study.sampler = self._sampler()
                trial = self._study.ask(fixed_distributions=self._distributions)
                trial.set_user_attr("worker", self._worker.name)
            job = self._job(trial)
            if job is not None:
                self._to_begin -= 1
                return job
            mistakes += 1
            if mistakes >= MISTAKES_IN_A_ROW and self.definition.config.sampler != "grid":
                raise UserError(
                    f"{mistakes} settings in a row make no run, the last since {self._says(trial)}: correct the space"
                )

    def _job(self, trial: optuna.Trial) -> TrialJob | None:
        definition = self.definition
        own = space.overrides_of(definition.config.space, trial.params)
        overrides = [*definition.overrides, *own]
        try:
            config = compose_run(overrides, "search", definition.config_dir)
        except UserError as error:  # e.g. more experts a token than there are
            trial.set_user_attr("says", str(error))
            self._study.tell(trial, state=TrialState.FAIL)
            return None
        label = f"trial {trial.number}: {space.label({**definition.level, **trial.params})}"
        job = TrialJob(label, tuple(overrides), config, definition.settings, self, trial)
        trial.set_user_attr("hash", job.hash)
        return job

    # ------------------------------------------------------------------------------------------------------ telling

    def prune(self, job: TrialJob, rows: Sequence[Row]) -> str | None:
        """Why the run is to be given up, if it is, by the evaluations among its new rows."""
        pruning, trial = self.definition.config.pruning, job.trial
        if pruning is None or trial is None:
            return None
        metric = _METRIC[self.definition.config.objectives[0]]
        for row in rows:
            loss, tokens = row.get(metric), int(row.get("progress/tokens") or 0)
            step = tokens // pruning.every_tokens * pruning.every_tokens  # where runs can be compared
            if loss is None or step == 0 or progress(job.config.stop, row) >= 1:
                continue
            if step not in self._frozen(trial).intermediate_values:
                trial.report(loss, step)
                if trial.should_prune():
                    return f"given up after {tokens:,} tokens, being behind other runs"
        return None

    def tell_result(self, job: TrialJob, summary: dict[str, Any]) -> str | None:
        """Returns why the run counts for nothing, if it does."""
        assert job.trial is not None
        values = [summary.get(figure) for figure in self.definition.config.objectives]
        unknown = [figure for figure, value in zip(self.definition.config.objectives, values) if value is None]
        job.trial.set_user_attr("figures", {k: v for k, v in summary.items() if isinstance(v, int | float)})
        if unknown:
            why = self.tell_failure(job, f"{unknown[0]} is not known of it")
            if not self.trials(TrialState.COMPLETE):  # and of no other
                raise UserError(f"{job.hash}: {why}, so it cannot be what runs are judged by: {_remedy(unknown[0])}")
            return why
        self._study.tell(job.trial, [float(value) for value in values if value is not None])
        return None

    def tell_failure(self, job: TrialJob, says: str) -> str:
        """A run that diverged is a lesson to the sampler where there is one objective; other failures are none."""
        assert job.trial is not None
        job.trial.set_user_attr("says", says)
        lesson = is_divergence(says) and len(self.definition.config.objectives) == 1
        self._study.tell(job.trial, state=TrialState.PRUNED if lesson else TrialState.FAIL)
        return says

    def tell_pruned(self, job: TrialJob, says: str) -> None:
        assert job.trial is not None
        job.trial.set_user_attr("says", says)
        self._study.tell(job.trial, state=TrialState.PRUNED)

    def _frozen(self, trial: optuna.Trial) -> optuna.trial.FrozenTrial:
        return self._study._storage.get_trial(trial._trial_id)

    def _says(self, trial: optuna.Trial) -> str:
        return str(self._frozen(trial).user_attrs.get("says"))


def _may_do_better(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether its run was killed, or had no disk, or the like."""
    attributes = trial.user_attrs
    return trial.state == TrialState.FAIL and "hash" in attributes and not is_divergence(str(attributes.get("says")))


def _remedy(figure: str) -> str:
    if figure.startswith("usd"):
        return "give hardware.price_usd_per_hour=… (runs=OTHER makes them anew), or take another objective"
    return "take another objective"


def _pruner(pruning: PruningConfig | None) -> optuna.pruners.BasePruner:
    if pruning is None:
        return optuna.pruners.NopPruner()
    if pruning.kind == "median":
        return optuna.pruners.MedianPruner(pruning.startup_trials, pruning.warmup_tokens)
    return optuna.pruners.SuccessiveHalvingPruner(max(pruning.every_tokens, pruning.warmup_tokens))
