"""Today's rental prices from public catalogues, written as hardware files of your own (extra `prices`, network).

python scripts/prices.py hardware=h100,rtx_4090|all out=DIR [json=FILE]
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from moe_train.cli import check_json_target, parse_arguments, wants_traceback, write_json
from moe_train.cost.catalog import known, quotes, write_hardware_file
from moe_train.errors import reported


@dataclass
class Arguments:
    hardware: str
    out: Path
    json: Path | None = None


def main() -> None:
    arguments = parse_arguments(Arguments, sys.argv[1:], usage=(__doc__ or "").strip().splitlines()[-1])
    check_json_target(arguments.json, arguments.out)
    names = known() if arguments.hardware == "all" else arguments.hardware.split(",")
    found = quotes(names)
    for quote in found:
        path = write_hardware_file(quote, arguments.out, date.today())
        print(f"{quote.hardware}: ${quote.usd_per_hour:g} an hour ({quote.low:g} to {quote.high:g})  {path}")
        print(f"  python train.py --config-dir {arguments.out} hardware={path.stem}")
    if arguments.json:
        write_json(arguments.json, {"quotes": [asdict(quote) for quote in found]})


if __name__ == "__main__":
    with reported(wants_traceback()):
        main()
