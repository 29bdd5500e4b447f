"""Layers, parameters, FLOPs, cache and training memory of a model, before anything is trained.

A further architecture is one file, DIR/model/NAME.yaml, with --config-dir DIR. Any key of model, optimizer
and precision can be set as for train.py: model.moe.num_experts=32 model/mtp=depth_1 precision=fp8_deepseek.

python scripts/describe.py model=NAME [sequence_length=N] [vocab_size=N] [batch=TOKENS_A_DEVICE_HOLDS] \
[compute_dtype=bfloat16|float32] [activation_checkpointing=false] [json=FILE] [--config-dir DIR] [model.KEY=VALUE …]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_train.cli import check_json_target, parse_arguments, wants_traceback, write_json
from moe_train.compose import compose_model, split_overrides
from moe_train.config.fields import Size
from moe_train.describe import describe, show
from moe_train.errors import reported


@dataclass
class Arguments:
    sequence_length: Size | None = None  # None: a run's, or 4,096 for a published architecture
    vocab_size: Size | None = None
    batch: Size | None = None  # tokens a device holds at once; None: one sequence
    compute_dtype: Literal["bfloat16", "float32"] | None = None  # None: what precision says, for auto bfloat16
    activation_checkpointing: bool = False
    json: Path | None = None


def main() -> None:
    overrides, config_dir, others = split_overrides(sys.argv[1:])
    arguments = parse_arguments(Arguments, others, usage=(__doc__ or "").strip().splitlines()[-1])
    check_json_target(arguments.json)
    description = describe(
        compose_model(overrides, config_dir),
        sequence_length=arguments.sequence_length,
        vocab_size=arguments.vocab_size,
        batch=arguments.batch,
        compute_dtype=arguments.compute_dtype,
        activation_checkpointing=arguments.activation_checkpointing,
    )
    show(description)
    if arguments.json:
        write_json(arguments.json, description)


if __name__ == "__main__":
    with reported(wants_traceback()):
        main()
