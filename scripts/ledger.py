"""The bill of all runs made here: dollars and hours by project, sweep, claim, day, run or hardware.

Kept apart are the final run, tuning, seeds, runs that never finished and work lost to crashes; rent, ownership, energy.

python scripts/ledger.py [by=project|sweep|claim|day|run|hardware] [ledger=outputs/ledger.jsonl] [final=RUN_FOLDER] \
[json=FILE]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from moe_train.cli import check_json_target, parse_arguments, wants_traceback, write_json
from moe_train.cost.bill import By, make_bill
from moe_train.cost.shared_ledger import read_ledger
from moe_train.errors import reported
from moe_train.tracking.bill_table import show


@dataclass
class Arguments:
    by: By = "project"
    ledger: Path = Path("outputs/ledger.jsonl")
    final: Path | None = None  # the run that the others led to
    json: Path | None = None


def main() -> None:
    arguments = parse_arguments(Arguments, sys.argv[1:], usage=(__doc__ or "").strip().splitlines()[-1])
    check_json_target(arguments.json)
    attempts, unreadable = read_ledger(arguments.ledger)
    bill = make_bill(attempts, arguments.by, arguments.final)
    show(bill, arguments.by, unreadable)
    if arguments.json:
        write_json(arguments.json, bill.as_dict() | {"by": arguments.by, "unreadable_lines": unreadable})


if __name__ == "__main__":
    with reported(wants_traceback()):
        main()
