"""A checkpoint that several processes wrote in shards, as one file of weights and one of optimizer states.

python scripts/consolidate.py run=RUN_OR_CHECKPOINT
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from moe_train.cli import parse_arguments, wants_traceback
from moe_train.errors import reported


@dataclass
class Arguments:
    run: Path  # a run's folder, whose newest checkpoint is meant, or one of its checkpoints/step_N


def main() -> None:
    arguments = parse_arguments(Arguments, sys.argv[1:], usage=(__doc__ or "").strip().splitlines()[-1])
    from moe_train.training.consolidate import consolidate

    sys.stdout.write(f"{consolidate(arguments.run)}\n")


if __name__ == "__main__":
    with reported(wants_traceback()):
        main()
