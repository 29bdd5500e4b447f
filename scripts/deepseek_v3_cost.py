"""The $5.576M of DeepSeek-V3 recomputed from its configuration: implied speed, sensitivity, and what it leaves out.

python scripts/deepseek_v3_cost.py [plot=FILE.svg|png|pdf] [json=FILE]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from moe_train.cli import check_json_target, check_plot_target, parse_arguments, wants_traceback, write_json
from moe_train.compose import CONFIGS, compose_model
from moe_train.cost.hardware import load_hardware
from moe_train.errors import reported
from moe_train.forecast.deepseek_v3 import recompute
from moe_train.forecast.published import published_runs
from moe_train.forecast.tables import show_deepseek_v3


@dataclass
class Arguments:
    plot: Path | None = None
    json: Path | None = None


def main() -> None:
    arguments = parse_arguments(Arguments, sys.argv[1:], usage=(__doc__ or "").strip().splitlines()[-1])
    check_json_target(arguments.json)
    check_plot_target(arguments.plot)
    model = compose_model(["model=deepseek_v3"]).model
    h800, h100 = (load_hardware(CONFIGS / f"hardware/{name}.yaml") for name in ("h800", "h100"))
    content = recompute(model, model.vocab_size or 0, h800, h100, published_runs())
    show_deepseek_v3(content)
    if arguments.plot:
        from moe_train.forecast.plot import plot_deepseek_v3

        plot_deepseek_v3(content, arguments.plot)
    if arguments.json:
        write_json(arguments.json, content)


if __name__ == "__main__":
    with reported(wants_traceback()):
        main()
