"""Text from a trained model, with speculative=true from drafts of its own MTP modules, the same text in fewer passes.

python scripts/generate.py run=DIR prompt="def " [max_new_tokens=200] [temperature=0.8] [seed=0] \
[num_threads=N] [json=FILE]
python scripts/generate.py run=DIR prompt="def " temperature=0 speculative=true [compare=true]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from moe_train.before_torch import settle_environment
from moe_train.cli import check_json_target, parse_arguments, wants_traceback, write_json
from moe_train.errors import UsageError, reported

if TYPE_CHECKING:
    from moe_train.generation import Comparison, Generated, SpeculativeDecoder

USAGE = "\n".join((__doc__ or "").strip().splitlines()[2:])


@dataclass
class Arguments:
    run: Path  # a run folder, or one of its checkpoints
    prompt: str = ""
    max_new_tokens: Annotated[int, Field(gt=0)] = 200
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.8  # 0: always the likeliest token
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    num_threads: Annotated[int, Field(gt=0)] | None = None  # None: as the run
    speculative: bool = False
    compare: bool = False  # with plain greedy decoding
    json: Path | None = None


def main() -> None:
    settle_environment()
    arguments = parse_arguments(Arguments, sys.argv[1:], usage=USAGE)
    check_json_target(arguments.json)
    try:
        arguments.prompt.encode()
    except UnicodeEncodeError:
        raise UsageError("prompt= is not UTF-8 text: write it in that encoding") from None
    if arguments.speculative and arguments.temperature != 0:
        raise UsageError(
            f"speculative=true is greedy decoding and temperature={arguments.temperature:g} draws tokens: "
            "add temperature=0, or leave speculative out"
        )
    if arguments.compare and not arguments.speculative:
        raise UsageError("compare=true compares speculative decoding with plain: add speculative=true temperature=0")
    import torch

    from moe_train.generation import PlainDecoder, SpeculativeDecoder, compare, generate, load_for_generation
    from moe_train.generation.decoding import device_of
    from moe_train.generation.loading import threads_of
    from moe_train.machine import cpu_name
    from moe_train.training.compute import set_threads

    trained = load_for_generation(arguments.run.absolute())
    if threads := arguments.num_threads or threads_of(trained.config):
        set_threads(threads)
    model, tokenizer = trained.model, trained.tokenizer
    prompt, limit = arguments.prompt, arguments.max_new_tokens
    if arguments.compare:
        comparison = compare(model, tokenizer, prompt, limit)
        result = comparison.speculative
        figures = _figures(result) | _draft_figures(comparison.decoder) | _comparison_figures(comparison)
    elif arguments.speculative:
        decoder = SpeculativeDecoder(model)
        result = generate(decoder, tokenizer, prompt, limit)
        figures = _figures(result) | _draft_figures(decoder)
    else:
        result = generate(PlainDecoder(model, arguments.temperature, arguments.seed), tokenizer, prompt, limit)
        figures = _figures(result)
    device = device_of(model).type
    figures |= {"compute_dtype": "float32", "device": device, "num_threads": torch.get_num_threads()}
    figures["device_name"] = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    sys.stdout.write(result.text + "\n")
    sys.stdout.flush()
    sys.stderr.write(_said(figures))
    if arguments.json:
        write_json(arguments.json, {"text": result.text, **figures})


def _figures(result: Generated) -> dict[str, Any]:
    return {
        "new_tokens": result.new_tokens,
        "tokens_per_second": result.tokens_per_second,
        "forward_passes": result.forward_passes,
        "cache_elements_per_token": result.cache_elements_per_token,
        "cache_bytes": result.cache_bytes,
    }


def _draft_figures(decoder: SpeculativeDecoder) -> dict[str, Any]:
    return {
        "acceptance": decoder.acceptance,
        "acceptance_per_depth": decoder.acceptance_per_depth,
        "drafted": sum(decoder.drafted),
        "accepted": sum(decoder.accepted),
    }


def _comparison_figures(comparison: Comparison) -> dict[str, Any]:
    return {
        "greedy_tokens_per_second": comparison.greedy.tokens_per_second,
        "speed_up": comparison.speed_up,
        "speed_ups": comparison.speed_ups,
        "same_text": comparison.same_text,
    }


def _said(figures: dict[str, Any]) -> str:
    """The same for people, a line each."""
    threads = f", num_threads={figures['num_threads']}" if figures["device"] == "cpu" else ""
    lines = [
        f"{figures['new_tokens']} tokens, {figures['tokens_per_second']:,.0f} tokens/s in {figures['compute_dtype']} "
        f"({figures['device']}{threads}); cache: {figures['cache_elements_per_token']:,} elements a token, "
        f"{figures['cache_bytes']:,} bytes in all"
    ]
    if figures.get("acceptance") is not None:
        by_depth = ", ".join("none drafted" if a is None else f"{a:.0%}" for a in figures["acceptance_per_depth"])
        lines.append(
            f"{figures['acceptance']:.0%} of the drafts accepted (by depth: {by_depth}): "
            f"{figures['forward_passes']} passes of the model"
        )
    if "speed_up" in figures:
        low, *_, high = figures["speed_ups"]
        lines.append(
            f"plain greedy decoding: {figures['greedy_tokens_per_second']:,.0f} tokens/s; speculative decoding is "
            f"{figures['speed_up']:.2f} times as fast ({low:.2f} to {high:.2f} in {len(figures['speed_ups'])} pairs), "
            + ("the text is the same" if figures["same_text"] else "the texts differ: two tokens were nearly tied")
        )
    return "".join(line + "\n" for line in lines)


if __name__ == "__main__":
    with reported(wants_traceback()):
        main()
