"""What a run would take, before it is made: memory, speed, GPU-hours, dollars and energy, each with an interval.

    model=NAME tokens=N hardware=NAME num_gpus=N   from published runs; other settings of the model as for train.py
    parts=true model=NAME hardware=NAME num_gpus=N batch_size=N   from its parts: where the hours go, what limits it
    published=true                                 how near that comes for the published runs, each left out in turn
    fit=true hardware=NAME [model=NAME] [precision=NAME]   largest micro-batch, longest sequence, whether to checkpoint
    probe=true tokens=N [train.py's settings]      from 20 steps on the device at hand; against=RUN compares afterwards

python scripts/forecast.py model=NAME tokens=N hardware=NAME [num_gpus=1] [precision=bf16|fp8] \
[parallel=auto|single|ddp|fsdp2|ep|ep_fsdp2] [expert_parallel=N] [micro_batch=1] [sequence_length=N] [vocab_size=N] \
[activation_checkpointing=auto|true|false] [price_usd_per_hour=X] [json=FILE] [--config-dir DIR] [model.KEY=VALUE …]
parts=true also takes pipeline_parallel=N pipeline_schedule=1f1b|zb1p|dualpipe sharding=ddp|zero1|fsdp2 \
attention_kernel=flash_attention_2|flash_attention_3 and plot=FILE.svg|png|pdf
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from moe_train.cli import (
    check_json_target,
    check_plot_target,
    divide_arguments,
    parse_arguments,
    wants_traceback,
    write_json,
)
from moe_train.compose import split_overrides
from moe_train.config.fields import Amount, Size
from moe_train.errors import UsageError, ended_by_signals, reported
from moe_train.forecast import commands
from moe_train.forecast.parts import Sharding
from moe_train.forecast.parts_command import put_together
from moe_train.forecast.pipeline import Schedule
from moe_train.forecast.rates import AttentionKernel

USAGE = (__doc__ or "").strip()


@dataclass
class Arguments:
    tokens: Amount | None = None
    hardware: str | None = None
    num_gpus: Size = 1
    precision: str | None = None  # bf16 or fp8; of fit and probe, whatever train.py takes
    parallel: commands.Parallel = "auto"
    expert_parallel: Size | None = None
    micro_batch: Size = 1
    sequence_length: Size | None = None
    vocab_size: Size | None = None
    activation_checkpointing: Literal["auto", "true", "false"] = "auto"
    price_usd_per_hour: Annotated[float, Field(ge=0, le=1e9)] | None = None
    parts: bool = False
    batch_size: Size | None = None
    pipeline_parallel: Size = 1
    pipeline_schedule: Schedule = "1f1b"
    sharding: Sharding = "zero1"
    attention_kernel: AttentionKernel | None = None  # MLA has 2, others 3
    plot: Path | None = None
    published: bool = False
    fit: bool = False
    probe: bool = False
    against: Path | None = None
    json: Path | None = None


_PLAN = ("tokens", "hardware", "num_gpus", "precision", "parallel", "expert_parallel", "micro_batch")
_TAKES = {
    "forecast": (*_PLAN, "sequence_length", "vocab_size", "activation_checkpointing", "price_usd_per_hour"),
    "parts": (
        *("tokens", "hardware", "num_gpus", "precision", "expert_parallel", "micro_batch", "sequence_length"),
        *(
            "vocab_size",
            "price_usd_per_hour",
            "batch_size",
            "pipeline_parallel",
            "pipeline_schedule",
            "sharding",
            "attention_kernel",
            "plot",
        ),
    ),
    "published": (),
    "fit": ("hardware", "precision", "sequence_length", "vocab_size"),
    "probe": ("tokens", "hardware", "precision", "batch_size", "against"),
}


def main() -> None:
    own, others = divide_arguments(Arguments, sys.argv[1:])
    arguments = parse_arguments(Arguments, own, usage=USAGE)
    check_json_target(arguments.json)
    check_plot_target(arguments.plot)
    modes = [mode for mode in ("parts", "published", "fit", "probe") if getattr(arguments, mode)]
    if len(modes) > 1:
        raise UsageError(f"{' and '.join(f'{mode}=true' for mode in modes)} are different questions: ask one")
    mode = modes[0] if modes else "forecast"
    for argument in own:
        key = argument.partition("=")[0]
        if key not in (*_TAKES[mode], *modes, "json") and argument not in ("-h", "--help"):
            goes_with = "parts" if key in _TAKES["parts"] else "probe"
            raise UsageError(
                f"{key}= does nothing with {mode}=true: leave it out" if modes else f"{key}= goes with {goes_with}=true"
            )
    content: dict[str, Any]
    if arguments.probe:
        names = ("hardware", "precision", "batch_size")  # of train.py as well
        given = {name: getattr(arguments, name) for name in names}
        shared = [f"{key}={value}" for key, value in given.items() if value is not None]
        content = commands.probed([*others, *shared], arguments.tokens, arguments.against)
    else:
        overrides, config_dir, unknown = split_overrides(others)
        parse_arguments(Arguments, unknown, usage=USAGE)  # says what is wrong with them
        if arguments.published:
            if overrides:
                raise UsageError(f"{overrides[0]} does nothing with published=true: leave it out")
            content = commands.published()
        elif arguments.parts:
            content = put_together(arguments, overrides, config_dir)
        elif arguments.fit:
            content = commands.fitting(arguments, overrides, config_dir)
        else:
            content = commands.forecast_of(arguments, overrides, config_dir)
    if arguments.json:
        write_json(arguments.json, content)


if __name__ == "__main__":
    with reported(wants_traceback()), ended_by_signals():
        main()
