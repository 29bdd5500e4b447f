"""What a suite will take, before it begins: runs, FLOPs, hours, dollars.

On the device at hand from a probe (forecast/probe.py: twenty steps of one arm) of each kind of arm, the others reckoned
by their FLOPs. Runs that are there already are not counted. For a GPU one does not have (hardware=NAME) from what
models of claims' sizes reached on an H200, carried over by the data sheets: such models wait for memory and kernels,
and are far from the share of the peak that published runs a hundred times larger are known by.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moe_train.claims.device import device_here
from moe_train.claims.plan import Arm, Plan, PlannedRun
from moe_train.claims.results import Folder
from moe_train.claims.tuning import planned
from moe_train.cli import write_json
from moe_train.config import HardwareConfig, to_dict
from moe_train.errors import UserError
from moe_train.forecast import probe as probes
from moe_train.forecast.interval import NOTHING, Interval

OTHER_ARM = 1.5  # seconds a FLOP of an arm that was not probed, over those of one that was: a naive MoE's tax is 1.3
OTHER_RUN = 1.5  # seconds round the steps of a run, over those of the one that was probed: start-up hangs on neighbours
# What a run on a GPU that nobody probed spends beside steps at their pace: 56 runs on an H200 were billed 2.8 to 5.0 s,
# half of them 3.7 (docs/results/claims/dollars_again_gpu.json; 1.3 s are kernels being loaded, most of the rest the
# device being opened and validation), forked of one process (sweeps/warm.py). Processors and disks elsewhere may take
# three times as long: an assumption. Runs of claims are short: it is most of what they take.
START_SECONDS = Interval(4.0, 3.0, 12.0)
# FLOP/s of training on an H200 (989 TFLOP/s, 4.8 TB/s) by FLOPs a token, in BF16: of `base` 336 TFLOP/s at 721 MFLOPs
# (docs/results/nvidia_h200.json). What this power makes of it is 67 for a claim's arms at 8.2 MFLOPs, where a mixture
# reached 63 and its twin 77 (16,384 tokens in 2.12 and 1.74 ms, docs/log.md), and 74 for `nano` at 10.6, where 83 were
# measured with steps of 64K (nvidia_h200_nano.json).
H200_FLOPS, H200_AT, H200_FALLS = 336e12, 721e6, 0.36
H200_PEAK, H200_BANDWIDTH = 989.0, 4.8  # TFLOP/s, TB/s

Probe = Callable[[Sequence[str], int], dict[str, Any]]


@dataclass(frozen=True)
class Estimate:
    """Of the runs of a claim that are not there yet; `usd` None without a price."""

    runs: int
    there: int
    flops: float
    seconds: Interval
    usd: Interval | None
    source: str


@dataclass(frozen=True)
class Speed:
    """Of one kind of arm on one device: seconds a FLOP, seconds round the steps, dollars a second."""

    arm_hash: str
    per_flop: Interval
    around: float
    usd_per_second: float | None
    source: str

    def seconds(self, run: PlannedRun, exact: bool) -> Interval:
        rate = (
            self.per_flop
            if exact
            else Interval(self.per_flop.value, self.per_flop.low / OTHER_ARM, self.per_flop.high * OTHER_ARM)
        )
        around = Interval(self.around, self.around / OTHER_RUN, self.around * OTHER_RUN)
        return rate * run.flops + around


def estimate(plan: Plan, folder: Folder, probe: Probe, taken: set[str], settings: Sequence[str]) -> Estimate:
    """On the device at hand. `taken`: hashes other claims pay for, to which this one's are added."""
    runs = [run for run in planned(plan, folder) if run.hash not in taken]
    taken |= {run.hash for run in runs}
    left = [run for run in runs if not folder.is_finished(run)]
    seconds, usd = NOTHING, NOTHING
    priced, sources = True, []
    for run in left:
        speed = _speed(plan, plan.arms[run.arm], folder, probe, settings)
        took = speed.seconds(run, exact=speed.arm_hash == _probed_as(plan.arms[run.arm]))
        seconds += took
        priced = priced and speed.usd_per_second is not None
        usd += took * (speed.usd_per_second or 0.0)
        sources.append(speed.source)
    source = f"reckoned from {', '.join(dict.fromkeys(sources))}" if sources else "nothing is left to do"
    return Estimate(
        len(runs), len(runs) - len(left), sum(r.flops for r in left), seconds, usd if priced else None, source
    )


def estimate_elsewhere(plan: Plan, hardware: HardwareConfig, taken: set[str]) -> Estimate:
    """On a GPU by what an H200 reached. Raises UserError where its peak is not known."""
    runs = [run for run in planned(plan, None) if run.hash not in taken]
    taken |= {run.hash for run in runs}
    slower = _slower_than_h200(hardware)
    seconds = NOTHING
    for run in runs:
        rate = H200_FLOPS * min(1.0, plan.arms[run.arm].flops_per_token / H200_AT) ** H200_FALLS
        seconds += START_SECONDS + slower * (run.flops / rate)
    price = hardware.price_usd_per_hour
    usd = None if price is None else seconds * (price / 3600)
    there = "" if hardware.name == "h200" else f", carried to {hardware.name} by peak and bandwidth, not measured there"
    around = f"{START_SECONDS.value:g} s ({START_SECONDS.low:g} to {START_SECONDS.high:g}) a run round its steps"
    said = ", ".join(filter(None, (hardware.price_source, hardware.price_date)))
    paid = "" if price is None else f"; ${price:g} an hour ({said})"
    source = f"reckoned from steps of such models as measured on an H200{there}; {around}{paid}"
    return Estimate(len(runs), 0, sum(run.flops for run in runs), seconds, usd, source)


def _slower_than_h200(hardware: HardwareConfig) -> Interval:
    """How many times as long a step takes: what is least favourable of peak and bandwidth, from what is most."""
    peak = hardware.peak_tflops.bfloat16
    if peak is None:
        raise UserError(
            f"hardware={hardware.name} has no BF16 peak to reckon with: choose another, or leave it out on a machine "
            "that has one, where it is probed"
        )
    ratios = [H200_PEAK / peak]
    if hardware.bandwidth_tb_s is not None:
        ratios.append(H200_BANDWIDTH / hardware.bandwidth_tb_s)
    return Interval(max(ratios), min(ratios) / OTHER_ARM, max(ratios) * OTHER_ARM)


def _kind(arm: Arm) -> str:
    """Arms of a kind spend about as long on a FLOP."""
    fp8 = arm.config.precision.name if arm.config.precision.fp8 is not None else "-"
    shape = (arm.config.batch_size, arm.config.data.sequence_length, arm.config.model.hidden_size)
    return "-".join(str(part) for part in (arm.config.optimizer.kind, fp8.split("_")[0], *shape))


def _probed_as(arm: Arm) -> str:
    return arm.config.config_hash()


def _speed(plan: Plan, arm: Arm, folder: Folder, probe: Probe, settings: Sequence[str]) -> Speed:
    """Probed once for each kind, and kept: another device, price or number of threads is probed anew."""
    here = device_here(plan)
    around = (here.name, here.hardware, here.price_usd_per_hour, arm.config.num_threads, to_dict(arm.config.cost))
    digest = hashlib.sha256(json.dumps(around, sort_keys=True).encode()).hexdigest()[:8]
    file = folder.path / "probes" / f"{_kind(arm)}-{digest}.json"
    try:
        return _as_speed(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none yet, or damaged
        pass
    longest = max(plan.scale.tokens)
    folders = [] if plan.config_dir is None else ["--config-dir", str(plan.config_dir.absolute())]
    sys.stderr.write(f"probing arm {arm.name} of {plan.claim.name}: twenty steps\n")
    of = {"claim": plan.claim.name, "arm": arm.name, "hash": _probed_as(arm)}
    content = probe([*folders, *arm.overrides, *settings], longest) | of
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, content)
    return _as_speed(content)


def _as_speed(content: dict[str, Any]) -> Speed:
    flops = content["flops_per_token"]
    rate = content["tokens_per_second"]
    per_flop = Interval(*(1 / rate[key] / flops for key in ("value", "high", "low")))
    wall, train = content["wall_seconds"]["value"], content["train_seconds"]["value"]
    usd = None if content["usd_total"] is None else content["usd_total"]["value"] / wall
    source = f"a probe of arm {content['arm']} of {content['claim']} on {content['device']}"
    return Speed(content["hash"], per_flop, wall - train, usd, source)


DEFAULT_PROBE: Probe = probes.probe_of_job
