"""What training costs on this device: arms that take turns, medians with quartiles, ceilings measured in the same run.

    step       a whole training step: tokens/s, share of the measured matmul rate, overhead of the loop, host reads
    tax        an MoE against its dense twin of equal FLOPs a token
    peer       the same weights in transformers' own architecture
    experts    8 and 256 experts, equally many of them a token
    kernels    each direction of the experts' grouped products, and rounding to FP8
    precision  FP8 recipes against the compute format
    startup    from the command to the first step
    smoke      a little of each, within a minute on two cores;  all: every suite but this

python scripts/benchmark.py suite=NAME[,NAME…] [rounds=9] [compile=true|false] [launch=false] [json=FILE] [save=true] \
[profile=true [out=DIR]] [--config-dir DIR] [settings of train.py: model, optimizer, precision, data, batch_size, …]

compile=false leaves out torch.compile of transformers' model, which takes minutes on a CPU; with smoke it is left out.
launch=false leaves out the run of the real command that suite=step makes for the overhead of its loop.
json=FILE and save=true are written after every suite, so that one that fails costs none before it. save=true keeps the
figures in docs/results/DEVICE.json, in the place of those of the same suite, model and settings and beside all others,
but not of a suite whose figures are unsteady: quartiles far apart, or a device that was faster before it than after.
profile=true writes a trace, the slowest operations and memory of suite=step's model into out= (by default under
outputs/).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from moe_train.before_torch import settle_environment
from moe_train.benchmark.choices import KEYS, SUITES, chosen
from moe_train.cli import check_json_target, divide_arguments, parse_arguments, wants_traceback
from moe_train.compose import compose_run, split_overrides
from moe_train.errors import EndedBySignal, UsageError, UserError, ended_by_signals, in_words, reported

if TYPE_CHECKING:
    from moe_train.benchmark.bench import Bench
    from moe_train.benchmark.keeping import Keeper

USAGE = (__doc__ or "").strip()


@dataclass
class Arguments:
    suite: str | None = None
    rounds: Annotated[int, Field(ge=3, le=1000)] | None = None
    compile: bool | None = None
    launch: bool = True
    json: Path | None = None
    save: bool = False
    profile: bool = False
    out: Path | None = None


def main() -> None:
    settle_environment()
    if os.environ.get("WORLD_SIZE", "1") != "1":  # before they wait for each other
        raise UserError("a benchmark is of one device: start it as one process, without torchrun's or srun's variables")
    own, others = divide_arguments(Arguments, sys.argv[1:])
    if "suite=" in own:
        raise UsageError(f"suite= is missing: choose from {', '.join(SUITES)}, or all")
    arguments = parse_arguments(Arguments, own, usage=USAGE)
    if arguments.suite is None and not arguments.profile:
        raise UsageError(f"suite= is missing: choose from {', '.join(SUITES)}, or all")
    check_json_target(arguments.json)
    names = chosen(arguments.suite) if arguments.suite else []
    if arguments.suite is None and (arguments.save or arguments.json):
        raise UsageError("save= and json= keep the figures of a suite: give suite=")
    if arguments.compile is not None and not {"peer", "smoke"} & set(names):
        raise UsageError("compile= is about transformers' model: give it with suite=peer")
    if not arguments.launch and "step" not in names:
        raise UsageError("launch= is about the run that suite=step makes: give it with suite=step")
    if arguments.out is not None and not arguments.profile:
        raise UsageError("out= is the folder of a profile: give profile=true as well")
    overrides, config_dir, unknown = split_overrides(others, KEYS)
    parse_arguments(Arguments, unknown, usage=USAGE, settings=KEYS)  # says what is wrong with them
    config = compose_run(overrides, "benchmark", config_dir)
    folder = _profile_folder(arguments.out) if arguments.profile else None

    from moe_train.benchmark import results
    from moe_train.benchmark.bench import Bench, Effort
    from moe_train.benchmark.keeping import Keeper
    from moe_train.training.runtime import start_runtime

    runtime = start_runtime(config)
    effort = Effort() if arguments.rounds is None else Effort(rounds=arguments.rounds)
    bench = Bench("step", tuple(overrides), config_dir, runtime, effort, arguments.compile, arguments.launch)
    saved = results.results_file(runtime) if arguments.save else None
    if saved is not None:
        results.check_file(saved, runtime.device_name)
    keeper = Keeper(arguments.json, saved)
    try:
        _measure(bench, names, keeper, folder)
    except EndedBySignal as end:
        raise EndedBySignal(end.number, f": {keeper.said or 'no figures are kept'}") from None
    except Exception as error:
        if wants_traceback() or not keeper.said:
            raise
        raise UserError(f"{in_words(error)}; {keeper.said}") from error
    keeper.close()


def _measure(bench: Bench, names: list[str], keeper: Keeper, folder: Path | None) -> None:
    from moe_train.benchmark import profiling, suites

    if names:
        suites.run(bench, names, keeper.keep)
    if folder is not None:
        sys.stdout.write(f"profile in {profiling.run(bench, folder)}\n")


def _profile_folder(out: Path | None) -> Path:
    """A new or empty folder. Raises UserError."""
    folder = out or Path("outputs") / "profiles" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"out={folder} is there already and not an empty folder: choose another or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    with reported(wants_traceback()), ended_by_signals():
        main()
