"""A mixture of experts that starts as a trained dense model: the starting point of a new run.

python scripts/upcycle.py run=DENSE_RUN out=DIR model=NAME [model.KEY=VALUE …] [name=NAME] [seed=0] [json=FILE]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from moe_train.cli import check_json_target, parse_arguments, wants_traceback, write_json
from moe_train.compose import compose_model, split_overrides
from moe_train.errors import UsageError, reported


@dataclass
class Arguments:
    run: Path  # a dense run's folder, or one of its checkpoints
    out: Path  # new or empty
    name: str = "upcycled"  # of the model and the experiment in OUT/configs
    seed: int = 0  # of the router
    json: Path | None = None


def main() -> None:
    overrides, config_dir, others = split_overrides(sys.argv[1:])
    arguments = parse_arguments(Arguments, others, usage=(__doc__ or "").strip().splitlines()[-1])
    check_json_target(arguments.json, arguments.out)
    for override in overrides:
        if not override.lstrip("+~").startswith("model"):
            raise UsageError(f"{override} is a setting of training, which comes later: leave it out")
    mixture = compose_model(overrides, config_dir).model
    from moe_train.training.upcycle import upcycle_run

    made = upcycle_run(arguments.run, arguments.out, mixture, arguments.name, arguments.seed)
    sys.stdout.write(
        f"{made.name}: {made.total_params:,} parameters, {made.active_params:,} active\n"
        f"to train from it:\n  {made.command}\n"
    )
    if arguments.json:
        write_json(arguments.json, made._asdict())


if __name__ == "__main__":
    with reported(wants_traceback()):
        main()
