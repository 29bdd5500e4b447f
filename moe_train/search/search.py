"""A whole search: its studies, one for each level, whose trials the pool makes side by side.

Several workers may share one: the same command given twice, on machines that see the same folders. A trial whose worker
was killed is taken up by the next one that starts, from its checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from omegaconf import DictConfig

from moe_train.compose import compose_unchecked, key_of, quoted
from moe_train.config.sweep import SweepConfig, Value
from moe_train.cost.budget import Budget
from moe_train.errors import UserError
from moe_train.search import space
from moe_train.search.storage import Worker, open_storage, said
from moe_train.search.study import Definition, Study, TrialJob
from moe_train.sweeps.board import Board
from moe_train.sweeps.devices import Devices, jobs_at_a_time, threads_of_a_job
from moe_train.sweeps.job import Job, Outcome
from moe_train.sweeps.metrics import Row
from moe_train.sweeps.pool import Made, Pool
from moe_train.sweeps.running import Start
from moe_train.sweeps.runs import RunsByHash

STORAGE = "study.db"


@dataclass(frozen=True)
class Asked:
    """`given`: settings of train.py for all runs. `jobs`: at a time; None: as fit."""

    name: str
    config: SweepConfig
    where: str  # the file it comes from
    out: Path
    runs: Path
    given: tuple[str, ...] = ()
    config_dir: Path | None = None
    usd: float | None = None
    jobs: int | None = None

    def definitions(self) -> list[Definition]:
        """One for each level, checked. Raises UserError for a key or a choice that does not exist."""
        config = self.config
        pruning = () if config.pruning is None else (f"eval.every_tokens={config.pruning.every_tokens}",)
        found = []
        for key in config.for_each:
            if any(key_of(override) == key for override in self.given):
                raise UserError(f"{self.where} makes a study for each {key}: leave {key}= out")
        for level, own in _levels(config):
            before = [*config.base, *own]
            try:
                compose_unchecked([*before, *self.given], self.config_dir)
            except UserError as error:
                raise UserError(f"{self.where}: {error}") from None
            space.check_space(config.space, before, self.given, self.where, self.config_dir)
            settings = (
                *(f"cost.sweep={quoted(self.name)}", "cost.purpose=tuning", "budget.usd=null"),
                f"tracking.group={quoted(self.name)}",
            )
            name = " ".join([self.name, *([space.label(level)] if level else [])])
            overrides = (*before, *self.given, *pruning)
            found.append(Definition(name, config, level, overrides, settings, self.config_dir))
        return found


def _levels(config: SweepConfig) -> list[tuple[dict[str, Value], list[str]]]:
    if not config.for_each:
        return [({}, [])]
    ((key, dimension),) = config.for_each.items()
    return [({key: value}, space.overrides_of(config.for_each, {key: value})) for value in space.choices_of(dimension)]


class Search:
    """`studies`: in the order of the levels. Raises UserError where something is wrong with space or storage."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.runs = RunsByHash(asked.runs.absolute())
        definitions = asked.definitions()
        out = asked.out.absolute()
        self.file = out / STORAGE
        storage = open_storage(self.file)
        self._worker = Worker(out)
        with said(self.file):
            self.studies = [Study(storage, definition, self._worker, out) for definition in definitions]

    @contextmanager
    def at_work(self) -> Iterator[Search]:
        try:
            with said(self.file):
                yield self
        finally:
            self._worker.leave()

    @cached_property
    def _composed(self) -> DictConfig:
        """Of any of the runs: what has nothing to do with the space."""
        return compose_unchecked(list(self.studies[0].definition.overrides), self.asked.config_dir)

    @cached_property
    def _budget(self) -> Budget:
        return Budget.of(self.asked.name, self._composed.cost.ledger, self.asked.usd)

    def usd_spent(self) -> float | None:
        """By all workers, on runs without a result too; None where there is no ledger or no price."""
        if self._budget.ledger is None:
            return None
        known = [attempt.usd for attempt in self._budget.attempts()]
        return None if any(usd is None for usd in known) else sum(usd or 0.0 for usd in known)

    def make(self, devices: Devices, board: Board | None = None, start: Start | None = None) -> Made:
        """Make the trials that are left, within the budget. Raises UserError."""
        threads = self._composed.num_threads
        at_a_time = jobs_at_a_time(devices, self.asked.jobs, threads)
        pool = Pool(
            *(self.runs, self._budget, at_a_time, devices),
            settings=threads_of_a_job(devices, at_a_time, threads),
            config_dir=self.asked.config_dir,
            start=start,
            board=board or Board(),
        )
        return pool.make(self._jobs(), _prune, self._tell)

    def _jobs(self) -> Iterator[TrialJob]:
        """What others left behind, then trials of all studies in turn, so that a budget that ends cuts all alike."""
        for study in self.studies:
            yield from study.taken_up()
        going = list(self.studies)
        while going:
            for study in list(going):
                job = study.ask()
                if job is None:
                    going.remove(study)
                else:
                    yield job

    def _tell(self, outcome: Outcome) -> None:
        """A trial that was interrupted stays as it is: it goes on next time."""
        job = outcome.job
        assert isinstance(job, TrialJob)
        assert job.study is not None
        if outcome.has_result:
            job.study.tell_result(job, self.runs.summary(job.hash) or {})
        elif outcome.status == "failed":
            job.study.tell_failure(job, outcome.says or "it failed")
        elif outcome.says is not None and outcome.says.startswith("given up"):
            job.study.tell_pruned(job, outcome.says)


def _prune(job: Job, rows: Sequence[Row]) -> str | None:
    assert isinstance(job, TrialJob)
    assert job.study is not None
    return job.study.prune(job, rows)
