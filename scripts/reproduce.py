"""Claims put to the test: what a technique saves at your scale, in tokens, FLOPs, seconds and dollars.

    claim=NAME|all scale=smoke|cpu|gpu   make the runs that are missing, and judge them; goes on after a kill
    … dry_run=true [hardware=NAME]       runs, FLOPs, hours and dollars beforehand, here or on a GPU you do not have
    self_check=true                      whether the statistics keep what they promise, made up and on real seeds
    readme=README.md [report=FILE,…]     write the tables of reports between the README's markers

python scripts/reproduce.py claim=NAME[,NAME…]|all scale=smoke|cpu|gpu [dry_run=true] [budget.usd=N] [jobs=N] \
[out=outputs/claims] [json=FILE] [--config-dir DIR] [settings of train.py for all arms: data, tracking, cost, \
hardware, num_threads]

smoke: minutes on two cores, proves nothing. cpu: about an hour a claim there. gpu: for one card. REPORT.md, report.html
and report.json are in out=, the runs beside them. jobs=N: several at a time; on one device their seconds do not count.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from moe_train.before_torch import settle_environment
from moe_train.claims.plan import ALLOWED
from moe_train.cli import check_json_target, divide_arguments, parse_arguments, wants_traceback, write_json
from moe_train.compose import split_overrides
from moe_train.config.claim import ScaleName
from moe_train.errors import UsageError, UserError, reported

USAGE = (__doc__ or "").strip()


@dataclass
class Arguments:
    claim: str | None = None
    scale: ScaleName | None = None
    dry_run: bool = False
    hardware: str | None = None
    budget_usd: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # budget.usd=
    jobs: Annotated[int, Field(ge=1, le=1024)] | None = None
    out: Path = Path("outputs/claims")
    json: Path | None = None
    self_check: bool = False
    readme: Path | None = None
    report: str | None = None  # files, with commas between them


def main() -> None:
    settle_environment()
    # A key with a dot can be no field of a dataclass.
    words = [f"budget_usd={word[11:]}" if word.startswith("budget.usd=") else word for word in sys.argv[1:]]
    own, others = divide_arguments(Arguments, words)
    overrides, config_dir, unknown = split_overrides(others, ALLOWED)
    try:
        arguments = parse_arguments(Arguments, [*own, *unknown], usage=USAGE, settings=ALLOWED)
    except UsageError as error:
        raise UsageError(str(error).replace("budget_usd", "budget.usd")) from None
    if importlib.util.find_spec("scipy") is None:
        raise UserError('the statistics are those of scipy, which is not installed: pip install -e ".[claims]"')
    if not _is_ours(arguments.json):
        check_json_target(arguments.json, arguments.out)
    if arguments.readme is not None and (arguments.claim or arguments.scale or arguments.dry_run):
        raise UsageError("readme= writes the table of reports that are there: leave claim=, scale= and dry_run= out")
    content: dict[str, Any]
    if arguments.self_check:
        content = _self_check(arguments)
    elif arguments.readme is not None:
        content = _readme(arguments, arguments.readme)
    else:
        content = _suite(arguments, overrides, config_dir)
    if arguments.json:
        write_json(arguments.json, content)
    if not content.pop("complete", True):
        sys.exit(1)


def _is_ours(target: Path | None) -> bool:
    """Whether json= names what an earlier run of the same command wrote, which goes on where that was."""
    try:
        return target is not None and "claims" in json.loads(target.read_text())
    except (OSError, ValueError, TypeError):
        return False


def _suite(arguments: Arguments, overrides: list[str], config_dir: Path | None) -> dict[str, Any]:
    if arguments.claim is None or arguments.scale is None:
        raise UsageError("claim= and scale= are needed: claim=NAME or claim=all, and scale=smoke, cpu or gpu")
    from moe_train.claims import estimate, report, suite
    from moe_train.claims.results import Folder
    from moe_train.forecast.commands import named_hardware

    given = list(overrides)
    if arguments.hardware is not None and not arguments.dry_run:
        given.append(f"hardware={arguments.hardware}")
    asked = suite.Asked(
        arguments.claim, arguments.scale, arguments.out, tuple(given), config_dir, arguments.budget_usd, arguments.jobs
    )
    if arguments.dry_run:
        of_hardware = [each for each in overrides if each.startswith("hardware.")]
        for override in [] if arguments.hardware is None else of_hardware:
            if not override.startswith("hardware.price_usd_per_hour="):
                raise UserError(f"{override}: of a GPU one does not have only the price can be set: leave it out")
        elsewhere = None if arguments.hardware is None else named_hardware(arguments.hardware, None, config_dir)
        return {"claims": suite.foretell(asked, elsewhere, estimate.DEFAULT_PROBE)}
    judged = suite.reproduce(asked)
    folder = Folder(arguments.out.absolute())
    sys.stdout.write(f"report in {folder.path / report.MARKDOWN} and {folder.path / report.HTML}\n")
    return {
        "claims": [report.entry(each, folder) for each in judged],
        "complete": not any(each.reasons for each in judged),
    }


def _self_check(arguments: Arguments) -> dict[str, Any]:
    from moe_train.claims import self_check

    checks = self_check.run(arguments.out)
    failed = [check.what for check in checks if not check.passed]
    if failed:
        raise UserError(f"the self-check failed: {'; '.join(failed)}: do not trust a verdict of this installation")
    passed = [None if check.rate is None else check.passed for check in checks]  # null: not made
    return {"checks": [{**dataclasses.asdict(check), "passed": each} for check, each in zip(checks, passed)]}


def _readme(arguments: Arguments, readme: Path) -> dict[str, Any]:
    from moe_train.claims import markdown, record

    named = arguments.report or str(arguments.out / record.JSON)
    sources = [Path(name) for name in dict.fromkeys(named.split(",")) if name]
    if not sources:
        raise UsageError(f"report={named} names none: give one, or several with commas between them")
    contents = {os.path.relpath(file.absolute(), readme.absolute().parent): record.read(file) for file in sources}
    record.refuse_twice(contents)
    markdown.write_readme(readme, contents)
    return {"claims": [claim for content in contents.values() for claim in content["claims"]]}


if __name__ == "__main__":
    with reported(wants_traceback()):
        main()
