"""Text from a trained model.

python scripts/generate.py run=DIR prompt="def " [max_new_tokens=200] [temperature=0.8] [seed=0] [json=FILE]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from moe_train.cli import check_json_target, parse_arguments, wants_traceback, write_json
from moe_train.errors import reported


@dataclass
class Arguments:
    run: Path  # a run folder, or one of its checkpoints
    prompt: str = ""
    max_new_tokens: Annotated[int, Field(gt=0)] = 200
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.8  # 0: always the likeliest token
    seed: int = 0
    json: Path | None = None


def main() -> None:
    arguments = parse_arguments(Arguments, sys.argv[1:], usage=(__doc__ or "").strip().splitlines()[-1])
    check_json_target(arguments.json)
    from moe_train.generation import generate, load_for_generation

    model, tokenizer = load_for_generation(arguments.run.absolute())
    result = generate(
        model,
        tokenizer,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    rate = result.new_tokens / result.seconds
    sys.stdout.write(result.text + "\n")
    sys.stderr.write(f"{result.new_tokens} tokens, {rate:,.0f} tokens/s\n")
    if arguments.json:
        write_json(arguments.json, {"text": result.text, "tokens_per_second": rate})


if __name__ == "__main__":
    with reported(wants_traceback()):
        main()
