"""Search for the settings that give the most for the money: Optuna over runs of train.py, several at a time.

    sweep=NAME                     make the trials that are left; goes on after a kill, several workers may share it
    … show=true                    what is known so far, without a run

python scripts/sweep.py sweep=NAME [budget.usd=N] [trials=N] [jobs=N] [out=outputs/sweeps/NAME] [runs=outputs/runs] \
[plot=FILE] [json=FILE] [--config-dir DIR] [settings of train.py for all runs]

Spaces are in configs/sweep/, yours in DIR/sweep/. OUT has study.db, trials.json and trials.svg.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from moe_train.before_torch import settle_environment
from moe_train.cli import check_json_target, divide_arguments, parse_arguments, wants_traceback, write_json
from moe_train.compose import split_overrides
from moe_train.config.sweep import SweepConfig
from moe_train.errors import UsageError, UserError, reported
from moe_train.named_files import file_named, load_named, named_files

USAGE = (__doc__ or "").strip()


@dataclass
class Arguments:
    sweep: str
    budget_usd: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # budget.usd=
    trials: Annotated[int, Field(ge=1, le=100_000)] | None = None
    jobs: Annotated[int, Field(ge=1, le=1024)] | None = None
    out: Path | None = None
    runs: Path = Path("outputs/runs")
    show: bool = False
    plot: Path | None = None
    json: Path | None = None


def main() -> None:
    settle_environment()
    # A key with a dot can be no field of a dataclass.
    words = [f"budget_usd={word[11:]}" if word.startswith("budget.usd=") else word for word in sys.argv[1:]]
    own, others = divide_arguments(Arguments, words)
    _, config_dir, others = split_overrides(others, ())
    given = [word for word in others if "=" in word and word != "debug=traceback"]
    try:
        arguments = parse_arguments(Arguments, [*own, *(word for word in others if "=" not in word)], usage=USAGE)
    except UsageError as error:
        raise UsageError(str(error).replace("budget_usd", "budget.usd")) from None
    if importlib.util.find_spec("optuna") is None:
        raise UserError('searches are made by Optuna, which is not installed: pip install -e ".[sweep]"')
    check_json_target(arguments.json)
    check_json_target(arguments.plot, key="plot")
    file = file_named("sweep", arguments.sweep, named_files("sweep", config_dir))
    config = load_named("sweep", file, SweepConfig)
    if arguments.trials is not None:
        if config.sampler == "grid":
            raise UsageError(f"trials={arguments.trials}: sweep={arguments.sweep} is a grid and makes all of it")
        config = dataclasses.replace(config, trials=arguments.trials)
    from moe_train.search import plot, report, tables
    from moe_train.search.search import Asked, Search
    from moe_train.sweeps.devices import devices_here

    out = arguments.out or Path("outputs/sweeps") / arguments.sweep
    asked = Asked(
        *(arguments.sweep, config, str(file), out, arguments.runs, tuple(given), config_dir),
        *(arguments.budget_usd, arguments.jobs),
    )
    if arguments.show and not (out / "study.db").is_file():
        raise UserError(f"there is no search in {out}: leave out show=true, or give another out=")
    with Search(asked).at_work() as search:
        made = None if arguments.show else search.make(devices_here())
        content = report.content(search)
    where, picture = report.files(search)
    write_json(where, content)
    drawn = plot.plot(content, picture)
    tables.show(content)
    sys.stdout.write(f"all of it in {where}" + (f", drawn in {picture}\n" if drawn else "\n"))
    asked_for = {key: path for key, path in (("json", arguments.json), ("plot", arguments.plot)) if path}
    if made is not None:  # files that are there would be in the way of the same command
        made.raise_if_interrupted(", ".join(f"{key}={path}" for key, path in asked_for.items()))
    if arguments.json:
        write_json(arguments.json, content)
    if arguments.plot and not plot.plot(content, arguments.plot):
        sys.stdout.write(f"plot={arguments.plot} is not written: no trial has a result\n")
    if made is not None and made.stopped is not None:
        another = "".join(f", another {key}=" for key in asked_for)
        raise UserError(f"{made.stopped}: the search goes on with the same command and a larger budget{another}")


if __name__ == "__main__":
    with reported(wants_traceback()):
        main()
