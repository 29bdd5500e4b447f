"""One self-contained HTML page of all runs: loss over dollars, tokens, FLOPs and seconds; speed, cost, spending.

python scripts/dashboard.py [runs=GLOB] [out=outputs/dashboard.html] [serve=true [port=8321]] \
[ledger=outputs/ledger.jsonl] [claims=outputs/claims/report.json]

Runs are the run folders at or below what the glob matches (outputs/** by default). serve=true serves the page to this
machine's own browser and refreshes it as runs go on, until Ctrl-C.

python scripts/dashboard.py wandb [entity=NAME] [project=moe_train] [dry_run=true]

makes or renews the workspace "Cost" in wandb; with dry_run=true prints it, without a network or an account.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from moe_train.cli import parse_arguments, wants_traceback
from moe_train.dashboard import workspace_command
from moe_train.dashboard.content import Source
from moe_train.dashboard.page import check_target, write_page
from moe_train.dashboard.serve import DashboardServer
from moe_train.errors import UsageError, UserError, reported


@dataclass
class Arguments:
    runs: str = "outputs/**"
    out: Path | None = None
    serve: bool = False
    port: Annotated[int, Field(ge=0, le=65535)] | None = None
    ledger: Path = Path("outputs/ledger.jsonl")
    claims: Path = Path("outputs/claims/report.json")


def main() -> None:
    if sys.argv[1:2] == ["wandb"]:
        return workspace_command.main(sys.argv[2:])
    arguments = parse_arguments(Arguments, sys.argv[1:], usage=(__doc__ or "").strip())
    if arguments.serve and arguments.out is not None:
        raise UsageError("out= is the file of a page, and serve=true writes none: leave out one of them")
    if arguments.port is not None and not arguments.serve:
        raise UsageError("port= is where a page is served: give serve=true as well")
    source = Source(arguments.runs, arguments.ledger, arguments.claims)
    if arguments.serve:
        _serve(DashboardServer(source, 8321 if arguments.port is None else arguments.port))
    else:
        _write(source, arguments.out or Path("outputs/dashboard.html"), arguments.runs)


def _write(source: Source, out: Path, pattern: str) -> None:
    check_target(out)
    content = source.read()
    if not content["runs"] and not content["left_out"]:
        raise UserError(f"runs={pattern}: there is no run folder at or below it: train a run first, or give another")
    size = write_page(out, content)
    for each in content["left_out"]:
        some = ", ".join(each["folders"]) + (", …" if each["count"] > len(each["folders"]) else "")
        sys.stderr.write(f"note: {each['count']} left out: {each['reason']} ({some})\n")
    sys.stdout.write(f"{len(content['runs'])} runs in {out} ({size / 1e6:.1f} MB)\n")


def _serve(server: DashboardServer) -> None:
    try:
        sys.stdout.write(f"serving {server.url} to this machine (Ctrl-C ends it)\n")
        sys.stdout.flush()
        server.serve_forever()
    except KeyboardInterrupt:
        sys.stdout.write("\n")
    finally:
        server.server_close()


if __name__ == "__main__":
    with reported(wants_traceback()):
        main()
