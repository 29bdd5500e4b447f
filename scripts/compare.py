"""Two runs: the settings in which they differ, what each came to, and what each took to get as far as the worse one.

python scripts/compare.py RUN_A RUN_B [json=FILE]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from moe_train.cli import check_json_target, divide_arguments, parse_arguments, wants_traceback, write_json
from moe_train.dashboard.comparison import compare, open_run
from moe_train.dashboard.comparison_table import show
from moe_train.errors import UsageError, UserError, reported

USAGE = (__doc__ or "").strip().splitlines()[-1]


@dataclass
class Arguments:
    json: Path | None = None


def main() -> None:
    # A run's folder may have = in its name, as those of a grid do.
    own, others = divide_arguments(Arguments, sys.argv[1:])
    arguments = parse_arguments(Arguments, own, usage=USAGE)
    folders = [Path(each) for each in others if each != "debug=traceback"]
    if len(folders) != 2:
        raise UsageError(f"{len(folders)} run folders are given: give two, {USAGE}")
    if folders[0].resolve() == folders[1].resolve():
        raise UserError(f"both are the same run, {folders[1]}: give another to compare it with")
    check_json_target(arguments.json)
    content = compare(open_run(folders[0]), open_run(folders[1]))
    show(content)
    if arguments.json:
        write_json(arguments.json, content)


if __name__ == "__main__":
    with reported(wants_traceback()):
        main()
