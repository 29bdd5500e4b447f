"""`accelerate launch train.py [group=choice] [key=value]`: one training run; `-m` makes it a grid of runs.

Parses the command line with hydra and hands the checked configuration over. torch is imported only then, so that a
misspelt key costs a second and not five.
"""

import os
import sys
import traceback

# The output is for people: no character may end a run.
for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")

from moe_train.training import before_first_step

if __name__ == "__main__":
    before_first_step.take_signals()

import hydra
from omegaconf import DictConfig

from moe_train.before_torch import settle_environment
from moe_train.cli import check_grid_of_others, hydra_main, reported_job, wants_traceback
from moe_train.compose import CONFIGS, to_run_config


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(composed: DictConfig) -> None:
    # Inside hydra, which would add lines of its own to an error that reaches it.
    with reported_job(wants_traceback()):
        config = to_run_config(composed)
        check_grid_of_others(config.budget.usd)
        from moe_train.training.run import train

        train(config)


if __name__ == "__main__":
    settle_environment()
    status = 0
    try:
        hydra_main(main)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # debug=traceback
        traceback.print_exc()
        status = 1
    # All is written and closed. Python would take another second to dismantle torch, which the bill would not show, and
    # process groups whose other ends are dead can keep it from ending at all.
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by the shell
            stream.flush()
    os._exit(status)
