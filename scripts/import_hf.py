"""A model of transformers as a starting point: a run folder at step 0 that generates, exports and trains on.

python scripts/import_hf.py hf=FOLDER out=DIR [name=NAME] [tokenizer=NAME|FOLDER|bytes] [json=FILE]
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from moe_train.cli import check_json_target, parse_arguments, wants_traceback, write_json
from moe_train.errors import reported


@dataclass
class Arguments:
    hf: Path  # config.json, *.safetensors, tokenizer.json
    out: Path  # new or empty
    name: str | None = None  # of the model and the experiment; the folder's
    tokenizer: str | None = None  # of the hub, a folder or bytes; where the folder has none
    json: Path | None = None


def main() -> None:
    arguments = parse_arguments(Arguments, sys.argv[1:], usage=(__doc__ or "").strip().splitlines()[-1])
    check_json_target(arguments.json, arguments.out)
    from moe_train.interop.importing import import_model

    imported = import_model(arguments.hf, arguments.out, arguments.name, arguments.tokenizer)
    for note in imported.notes:
        sys.stderr.write(f"note: {note}\n")
    sys.stdout.write(
        f"{imported.name}: {imported.family}, {imported.num_params:,} parameters\n"
        f"to train from it:\n  {imported.command}\n"
    )
    if arguments.json:
        write_json(arguments.json, dataclasses.asdict(imported))


if __name__ == "__main__":
    with reported(wants_traceback()):
        main()
