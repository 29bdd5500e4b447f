"""A suite from its claims to its report: refuse, foretell, register, tune, train, judge.

Everything that can be refused is refused before the first run of the first claim. Claims follow one another, and the
report is written again after each, so that an interrupted suite has said what it knows.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
from rich.console import Console

from moe_train.claims import estimate as estimates
from moe_train.claims import registered, report, starts, tables, wandb_report
from moe_train.claims.device import Device, check_hardware, check_same_device, device_here
from moe_train.claims.library import load_claims
from moe_train.claims.plan import RUNS, Plan, PlannedRun, make_plan
from moe_train.claims.results import Folder
from moe_train.claims.runner import Runner
from moe_train.claims.tuning import Grid, best_rates, grid, planned
from moe_train.claims.verdict import Judged, judge
from moe_train.config import HardwareConfig
from moe_train.config.claim import ScaleName
from moe_train.config.data import TextFilesConfig
from moe_train.cost.budget import Budget
from moe_train.data.corpora import documents, source_files
from moe_train.errors import UserError
from moe_train.forecast.commands import at_price
from moe_train.sweeps.devices import Devices, devices_here, threads_of_a_job
from moe_train.sweeps.running import Start
from moe_train.sweeps.runs import RunsByHash

# Settings of every job that no loss depends on.
_SETTINGS = ("tracking.log_every_steps=10",)


@dataclass(frozen=True)
class Asked:
    """`given`: settings of train.py for all arms. `jobs`: at a time; None: as many as there are GPUs, else one."""

    claims: str
    scale: ScaleName
    out: Path
    given: tuple[str, ...] = ()
    config_dir: Path | None = None
    usd: float | None = None
    jobs: int | None = None

    def plans(self) -> list[Plan]:
        """Raises UserError for the first thing that is wrong with any of the claims."""
        claims = load_claims(self.claims, self.scale, self.config_dir)
        plans = [make_plan(claim, self.scale, self.given, self.config_dir, self.out) for claim in claims]
        for plan in plans:
            starts.check(plan)
            registered.check(plan, Folder(self.out))
        return plans

    def budget(self, plans: Sequence[Plan]) -> Budget:
        ledger = next(iter(plans[0].arms.values())).config.cost.ledger
        # The same folder by another path, or from another directory and so with another ledger, has cost as much.
        earlier = [] if self.usd is None else RunsByHash(self.out / RUNS).attempts()
        return Budget.of(f"claims in {self.out}", ledger, self.usd, earlier)


def foretell(asked: Asked, hardware: HardwareConfig | None, probe: estimates.Probe) -> list[dict[str, object]]:
    """`dry_run=true`: what would be done, shown and returned for the JSON. Nothing is trained but the probes."""
    plans, folder = asked.plans(), Folder(asked.out.absolute())
    _check_text(plans)
    _check_out(asked.out)
    _say_what_is_damaged(plans, folder)
    own = next(iter(plans[0].arms.values())).config.hardware.price_usd_per_hour
    if hardware is not None and own is not None:
        hardware = at_price(hardware, own)
    rows = _estimates(plans, folder, hardware, probe)
    tables.show_estimates(rows, asked.scale)
    return [tables.as_dict(plan, row) for plan, row in rows]


def _check_text(plans: Sequence[Plan]) -> None:
    """That files which are named are there: every run would look for them. Raises UserError."""
    data = next(iter(plans[0].arms.values())).config.data
    if isinstance(data, TextFilesConfig):
        source_files(data)
        documents(data)


def _check_out(out: Path) -> None:
    """Refuse a folder that cannot be written, before anything is made. Raises UserError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"out={out} cannot be written ({error.strerror}): choose another folder") from None


def _say_what_is_damaged(plans: Sequence[Plan], folder: Folder) -> None:
    """Before hours of other runs: their claims wait for these, the others do not."""
    runs = [run for plan in plans for run in planned(plan, folder)]
    for line in folder.results(runs)[1]:
        sys.stderr.write(f"note: {line}\n")


def _estimates(
    plans: Sequence[Plan], folder: Folder, hardware: HardwareConfig | None, probe: estimates.Probe
) -> list[tuple[Plan, estimates.Estimate]]:
    taken: set[str] = set()
    if hardware is not None:
        return [(plan, estimates.estimate_elsewhere(plan, hardware, taken)) for plan in plans]
    if plans[0].scale_name == "gpu" and not devices_here().on_gpu:
        sys.stderr.write(
            "note: scale=gpu is made for a GPU, and there is none: what follows is of this CPU, probed in minutes; "
            "dry_run=true hardware=NAME reckons for a GPU in seconds\n"
        )
    return [(plan, estimates.estimate(plan, folder, probe, taken, ())) for plan in plans]


def reproduce(
    asked: Asked,
    start: Start | None = None,
    device: Device | None = None,
    probe: estimates.Probe = estimates.DEFAULT_PROBE,
    console: Console | None = None,
) -> list[Judged]:
    """Make the runs that are missing and judge every claim. Raises UserError before the first of them."""
    plans, folder = asked.plans(), Folder(asked.out.absolute())
    _check_text(plans)
    device = device or device_here(plans[0])
    check_hardware(plans[0], device)
    if asked.scale == "gpu" and not device.on_gpu:
        sys.stderr.write(f"note: scale=gpu is made for a GPU, and there is none: runs are made on {device.name}\n")
    for plan in plans:
        check_same_device(plan, folder, device)
    budget = asked.budget(plans)
    report.read_if_there(folder)
    _check_out(asked.out)
    _say_what_is_damaged(plans, folder)
    if asked.usd is not None:
        _refuse_what_cannot_be_paid(plans, folder, asked.usd, budget, probe)
    devices = Devices.gpus(device.count) if device.on_gpu else Devices()
    threads = next(iter(plans[0].arms.values())).config.num_threads
    jobs = asked.jobs or devices.count
    lock = filelock.FileLock(folder.path / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"out={asked.out} is in use by another suite: wait for it or choose another out=") from None
    try:
        settings = [*_SETTINGS, *threads_of_a_job(devices, jobs, threads)]
        runner = Runner(folder, budget, jobs, devices, settings, asked.config_dir, start, console)
        judged: list[Judged] = []
        for plan in plans:
            registered.register(plan, folder)
        for plan in plans:
            judged.append(_one(plan, folder, runner))
            report.write(judged, folder)
            wandb_report.write(plan, report.entry(judged[-1], folder), folder)
    finally:
        with contextlib.suppress(UserError):  # of a report that was damaged meanwhile: what ended the suite is said
            report.write_page(folder)
        lock.release()
    tables.show_verdicts(judged)
    return judged


def _one(plan: Plan, folder: Folder, runner: Runner) -> Judged:
    """Tune, train and judge one claim."""
    tried: Grid = ()
    tuning, failed = list[PlannedRun](), list[str]()
    while (factors := grid(plan, folder)) != tried:
        tuning, tried = plan.tuning_runs(factors), factors
        failed = runner.make(tuning, plan.claim.name, _tags(tuning))
    rates = best_rates(plan, folder)
    if rates is None:
        return judge(plan, folder, tuning, [], plan.untuned(), failed)
    runs = plan.runs(rates)
    missing = runner.make(runs, plan.claim.name, _tags(runs))
    return judge(plan, folder, tuning, runs, rates, missing)


def _tags(runs: Sequence[PlannedRun]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for run in runs:
        names = found.setdefault(run.hash, [])
        if run.arm not in names:
            names.append(run.arm)
    return found


def _refuse_what_cannot_be_paid(
    plans: Sequence[Plan], folder: Folder, usd: float, budget: Budget, probe: estimates.Probe
) -> None:
    """A suite that ends for want of money shows nothing."""
    rows = _estimates(plans, folder, None, probe)
    if any(row.usd is None for _, row in rows):
        raise UserError(f"budget.usd={usd:g} needs a price: give hardware.price_usd_per_hour=…")
    least = sum(row.usd.low for _, row in rows if row.usd is not None)
    if least and budget.spent() + least > usd:
        raise UserError(
            f"budget.usd={usd:g}: ${budget.spent():.3g} are spent and the runs that are left take at least "
            f"${least:.3g}: raise it, or choose fewer claims or a smaller scale"
        )
