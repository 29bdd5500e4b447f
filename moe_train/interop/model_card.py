"""README.md of an export: what the model is, what it was trained on, what that cost, and what is not known.

Every figure is one the run recorded for the exported checkpoint; what it did not record is said to be so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.config import ModelConfig, RunConfig
from moe_train.cost.flops import parameter_counts
from moe_train.training.checkpoints import Checkpoint
from moe_train.training.run_folder import SUMMARY

if TYPE_CHECKING:
    from moe_train.interop.export import Exported

UNKNOWN = "not recorded"


def model_card(
    exported: Exported,
    theirs: Mapping[str, Any],
    config: RunConfig,
    checkpoint: Checkpoint,
    run_folder: Path,
    prefixed: bool,
) -> str:
    """The card of a checkpoint of `config`'s run.

    theirs: the written configuration. prefixed: whether the tokenizer sets a token before every text.
    """
    state, summary = checkpoint.state, _summary_of(run_folder, checkpoint)
    model = config.model.resolved()
    counts = parameter_counts(model, checkpoint.vocab_size)
    sections = [
        _front_matter(),
        f"# {config.name}\n\n{_what_it_is(exported, model, counts.active, state)}",
        f"## Architecture\n\n{_table(_architecture(theirs))}",
        f"## Training\n\n{_table(_training(config, state, summary))}",
        f"## Cost\n\n{_cost_note(summary)}{_table(_cost(state, summary, _ledger(run_folder)))}",
        f"## Use\n\n{_use(prefixed)}",
        "## Limits\n\nA base model: it continues text and follows no instructions. Nothing beyond the figures above is "
        "known of it; it was not checked for bias or harm.",
        "## Licence\n\nNot recorded: that of the weights depends on the licence of the training text, which the run "
        "does not know.",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter() -> str:
    return "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [moe_train]\n---"


def _what_it_is(exported: Exported, model: ModelConfig, active: int, state: Mapping[str, Any]) -> str:
    kind = "dense language model" if model.moe is None else "mixture-of-experts language model"
    active_part = "" if model.moe is None else f", {active:,} of them active for a token"
    lines = [
        f"A {kind} of {exported.num_params:,} parameters{active_part}, trained with moe_train and written as "
        f"`{exported.architecture}` in {exported.dtype} after step {exported.step:,}."
    ]
    if origin := state.get("origin"):
        lines.append(f"Its weights were {origin}.")
    if exported.mtp_modules:
        lines.append(
            f"Its {exported.mtp_modules} MTP module(s) are the layers from model.layers.{model.num_hidden_layers} on, "
            "as published with DeepSeek-V3. transformers' own loader reads MTP modules only at the depths of published "
            "models (61 layers of DeepSeek-V3); at others it calls their tensors unexpected and loads the rest."
        )
    elif model.mtp is not None:
        lines.append(f"It was trained with {model.mtp_depth} MTP module(s), which this export leaves out.")
    return " ".join(lines)


def _architecture(theirs: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    left_out = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout")
    return ((f"`{key}`", value) for key, value in theirs.items() if key not in left_out)


def _training(config: RunConfig, state: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    trained = int(state["step"]) > 0
    yield "corpus", config.data.name if trained else None
    yield "corpus fingerprint", state.get("corpus_fingerprint")
    yield "steps", f"{int(state['step']):,}"
    yield "tokens", f"{int(state['meter']['tokens']):,}"
    if config.init_from is not None:
        start = Path(config.init_from)
        yield (
            "started from the weights of",
            start.parent.parent.name if start.parent.name == "checkpoints" else start.name,
        )
    yield "sequence length", f"{config.data.sequence_length:,}"
    yield "optimizer, peak rate", f"{config.optimizer.kind}, {config.optimizer.lr:g}" if trained else None
    yield "schedule", config.schedule.kind if trained else None
    yield "batch size, sequences", config.batch_size if trained else None
    yield "seed", config.seed if trained else None
    yield "last training loss, nats a token", _number(state.get("train_loss"), ".4f")
    yield "validation loss, nats a token", _number(summary.get("val_loss"), ".4f")
    yield "validation, bits a byte", _number(summary.get("val_bits_per_byte"), ".4f")
    yield "configuration hash", state.get("config_hash")


def _cost(state: Mapping[str, Any], summary: Mapping[str, Any], attempts: int | None) -> Iterable[tuple[str, Any]]:
    devices = summary.get("num_devices")
    yield "device", summary.get("device_name") and f"{devices} × {summary['device_name']}"
    price = _number(summary.get("price_usd_per_hour"), ".4g")
    yield "dollars an hour and device", price and f"{price} ({summary.get('price_source') or 'source not recorded'})"
    yield "dollars, training steps", _number(summary.get("usd_train"), ".4g")
    yield "dollars in all, start-up, evaluation and earlier attempts included", _number(summary.get("usd_total"), ".4g")
    yield "training FLOPs, by formula", _number(state["meter"].get("flops") or None, ".4g")
    yield "training seconds", _number(state["meter"].get("train_seconds") or None, ",.1f")
    yield "seconds in all", _number(summary.get("wall_seconds"), ",.1f")
    yield "tokens a second", _number(summary.get("tokens_per_second"), ",.0f")
    yield "energy, kWh", _number(summary.get("energy_kwh"), ".4g")
    yield "attempts", attempts


def _cost_note(summary: Mapping[str, Any]) -> str:
    return "" if summary else "The run has no summary of this very checkpoint.\n\n"


def _use(prefixed: bool) -> str:
    special = "" if prefixed else "add_special_tokens=False, "
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
        f'ids = tokenizer("Once", {special}return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))\n"
        "```" + ("" if prefixed else "\n\nTexts were trained on without a token before them, only with one after.")
    )


def _number(value: Any, form: str) -> str | None:
    return format(value, form) if isinstance(value, int | float) else None


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    lines = ["| | |", "|---|---|"]
    for key, value in rows:
        shown = UNKNOWN if value is None and not key.startswith("`") else value
        cell = json.dumps(shown) if isinstance(shown, dict | list | bool) or shown is None else str(shown)
        lines.append(f"| {key} | {' '.join(cell.split()).replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _summary_of(run_folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """The run's summary if it was written at this very step, else nothing: its figures would be of other weights."""
    summary = _read(run_folder / SUMMARY)
    return summary if summary.get("steps") == checkpoint.step else {}


def _ledger(run_folder: Path) -> int | None:
    attempts = _read(run_folder / "ledger.json").get("attempts")
    return len(attempts) if isinstance(attempts, list) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
