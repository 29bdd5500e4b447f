"""A run's model as a folder that transformers loads as one of its own architectures.

python scripts/export_hf.py run=DIR out=DIR [family=auto|NAME] [dtype=stored|float32|bfloat16] [mtp=keep|drop] \
[max_shard_gb=5] [json=FILE]
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from moe_train.cli import check_json_target, parse_arguments, wants_traceback, write_json
from moe_train.errors import reported


@dataclass
class Arguments:
    run: Path  # a run folder, or one of its checkpoints
    out: Path  # new or empty
    family: str = "auto"  # auto, or a model_type of transformers
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    mtp: Literal["keep", "drop"] | None = None  # what becomes of MTP modules; to be said where there are some
    max_shard_gb: Annotated[float, Field(gt=0)] = 5.0
    json: Path | None = None


def main() -> None:
    arguments = parse_arguments(Arguments, sys.argv[1:], usage=(__doc__ or "").strip().splitlines()[-1])
    check_json_target(arguments.json, arguments.out)
    from moe_train.interop.export import export_run
    from moe_train.training.new_folder import check_free

    check_free(arguments.out)
    exported = export_run(
        arguments.run,
        arguments.out,
        family=arguments.family,
        dtype=arguments.dtype,
        mtp=arguments.mtp,
        max_shard_bytes=arguments.max_shard_gb * 1e9,
    )
    sys.stdout.write(
        f"{exported.architecture}, {exported.num_params:,} parameters in {exported.dtype}, step {exported.step:,}\n"
        f"AutoModelForCausalLM.from_pretrained({str(arguments.out)!r}) loads it; {arguments.out / 'README.md'} "
        "describes it\n"
    )
    if exported.mtp_modules:
        sys.stderr.write(
            "note: transformers' own loader reads MTP modules only at the depths of published models; at others it "
            f"calls the tensors of these {exported.mtp_modules} unexpected and loads the rest\n"
        )
    if arguments.json:
        write_json(arguments.json, dataclasses.asdict(exported))


if __name__ == "__main__":
    with reported(wants_traceback()):
        main()
