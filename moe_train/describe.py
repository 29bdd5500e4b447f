"""What a model configuration comes to: its layers and shapes, parameters, FLOPs, cache and training memory.

Shapes are those of the real modules, built on torch's meta device, where a tensor has no content: DeepSeek-V3 takes a
second. All other figures are the formulas of `cost/flops.py` and `cost/memory.py`.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_train.compose import ComposedModel
from moe_train.config import ModelConfig, PrecisionConfig
from moe_train.cost import bytes_each, flops, memory
from moe_train.cost.fp8_operands import Fp8Kept
from moe_train.cost.kernels import Kernels
from moe_train.errors import UserError
from moe_train.gpu import takes_gpu

if TYPE_CHECKING:
    from moe_train.model.transformer import Transformer


@dataclass(frozen=True)
class LayerRow:
    """Tensors of one kind of layer."""

    layers: str  # e.g. "blocks 3 to 60"
    count: int
    tensors: dict[str, list[int]]  # shapes by name
    params: int  # of one such layer


def describe(
    composed: ComposedModel,
    *,
    sequence_length: int | None,
    vocab_size: int | None,
    batch: int | None,
    compute_dtype: str | None,
    activation_checkpointing: bool,
) -> dict[str, Any]:
    """All figures, as they go into the JSON file: lengths in tokens, memory in bytes, FLOPs forward and backward.

    `sequence_length` None: that of a run, or 4,096, at which the published architectures were trained, for one that
    brings its own vocabulary. `vocab_size` None: the architecture's own, else the tokenizer's. `batch`: tokens a device
    holds at once; None: one sequence. It is a GPU that runs the Triton kernels. `compute_dtype` None: that of the
    precision, bfloat16 where it is auto. Under `bytes_each`: what memory comes to for a parameter and for a token, as
    composed and in BF16 with FP32 moments (keys: cost/bytes_each.py). Raises UserError where the sequence is too short
    for the MTP modules, or `compute_dtype` contradicts the precision.
    """
    model = composed.model.resolved()
    if sequence_length is None:
        sequence_length = composed.sequence_length
    if model.mtp_depth >= sequence_length:
        raise UserError(
            f"model.mtp.depth={model.mtp_depth} needs sequences longer than sequence_length={sequence_length}: lower it"
        )
    notes = []
    vocabulary = vocab_size or model.vocab_size
    if vocabulary is None:
        vocabulary = composed.default_vocab_size
        notes.append(f"vocab_size= is not given: {vocabulary:,} assumed, the default of a run's tokenizer")
    if batch is None:
        batch = sequence_length
    compute_dtype = _compute_dtype(compute_dtype, composed.precision)
    compute_bytes = 2 if compute_dtype == "bfloat16" else 4
    fp8 = Fp8Kept.by(composed.precision.fp8)
    counts = flops.parameter_counts(model, vocabulary)
    lookups = 0 if model.tie_word_embeddings else vocabulary * model.hidden_size  # a tied one is multiplied as the head
    in_training = memory.training_memory(
        model,
        vocabulary,
        batch,
        composed.optimizer,
        compute_bytes=compute_bytes,
        activation_checkpointing=activation_checkpointing,
        kernels=Kernels.TRITON,
        fp8=fp8,
    )
    length = min(sequence_length, batch)
    peak = memory.peak_training_memory(
        model,
        vocabulary,
        sequences=max(1, batch // length),
        sequence_length=length,
        optimizer=composed.optimizer,
        compute_bytes=compute_bytes,
        activation_checkpointing=activation_checkpointing,
        accumulates=False,
        device_type="cuda",
        fp8=fp8,
    )
    built = _built(model, vocabulary)
    return {
        "model": model.name,
        "sequence_length": sequence_length,
        "vocab_size": vocabulary,
        "total_params": counts.total,
        "active_params": counts.active,
        "active_params_without_embedding": counts.active - lookups,
        "mtp_params": counts.mtp,
        "flops_per_token": flops.training_flops_per_token(model, sequence_length, vocabulary),
        "cache_elements_per_token": memory.cache_elements_per_token(model),
        "cache_bytes_per_token": 2 * memory.cache_elements_per_token(model),
        "parts": _parts(model, sequence_length, vocabulary),
        "layers": [asdict(row) for row in _layers(built)],
        "precision": {"name": composed.precision.name, "rows": _formats(built, composed.precision, compute_dtype)},
        "memory": {
            "batch": batch,
            "optimizer": composed.optimizer.kind,
            "compute_dtype": compute_dtype,
            "activation_checkpointing": activation_checkpointing,
            "parts": [{"part": part, "bytes": count} for part, count in in_training.items()],
            "bytes": sum(in_training.values()),
            "peak_bytes": peak.bytes,
            "peak_moment": peak.moment,
            "assumptions": list(memory.ASSUMPTIONS),
        },
        "bytes_each": bytes_each.compared(
            model,
            vocabulary,
            batch,
            composed.optimizer,
            precision=composed.precision.name,
            compute_dtype=compute_dtype,
            fp8=fp8,
            activation_checkpointing=activation_checkpointing,
            kernels=Kernels.TRITON,
        ),
        "notes": notes,
    }


def _compute_dtype(asked: str | None, precision: PrecisionConfig) -> str:
    """The format of products outside FP8."""
    own = None if precision.compute_dtype == "auto" else precision.compute_dtype
    if asked and own and asked != own:
        raise UserError(f"compute_dtype={asked} contradicts precision={precision.name}, whose products are in {own}")
    return asked or own or "bfloat16"


def _parts(model: ModelConfig, sequence_length: int, vocab_size: int) -> list[dict[str, Any]]:
    params = flops.main_parameters(model, vocab_size)
    params[flops.MTP] = sum(flops.mtp_parameters(model).values())
    forward = flops.forward_flops(model, sequence_length, vocab_size)
    total = sum(forward.values())
    return [
        {
            "part": part,
            "params": params.get(part, 0),
            "flops_per_token": 3 * forward.get(part, 0.0),
            "flops_share": forward.get(part, 0.0) / total,
        }
        for part in flops.PARTS
        if params.get(part, 0) or forward.get(part, 0.0)
    ]


def _built(model: ModelConfig, vocab_size: int) -> Transformer:
    import torch

    from moe_train.model.transformer import Transformer

    with torch.device("meta"):
        return Transformer(model, vocab_size)


def _formats(built: Transformer, precision: PrecisionConfig, compute_dtype: str) -> list[dict[str, Any]]:
    import torch

    from moe_train.precision import recipes

    device = torch.device("cuda" if takes_gpu() else "cpu")
    recipes.apply(built, precision, device)
    return recipes.table(built, torch.float32 if compute_dtype == "float32" else torch.bfloat16, device)


def _layers(built: Transformer) -> list[LayerRow]:
    """Consecutive layers of the same shapes are one row."""
    # The numbers in front are those of layers: "blocks.3.attention.q_proj.weight" is layer blocks 3.
    layers: dict[tuple[str, int | None], dict[str, list[int]]] = {}
    for name, parameter in built.named_parameters():
        found = re.fullmatch(r"(blocks|mtp)\.(\d+)\.(.+)", name)
        if found:
            layers.setdefault((found[1], int(found[2])), {})[found[3]] = list(parameter.shape)
        else:
            owner, _, tensor = name.rpartition(".")
            layers.setdefault((owner, None), {})[tensor] = list(parameter.shape)
    rows = []
    for (owner, tensors), members in groupby(layers.items(), key=lambda layer: (layer[0][0], layer[1])):
        numbers = [number for (_, number), _ in members if number is not None]
        span = f" {numbers[0]}" + (f" to {numbers[-1]}" if len(numbers) > 1 else "") if numbers else ""
        size = sum(math.prod(shape) for shape in tensors.values())
        rows.append(LayerRow(owner + span, max(1, len(numbers)), tensors, size))
    return rows


def show(description: dict[str, Any], console: Console | None = None) -> None:
    """The description as tables, on stdout by default."""
    console = console or Console()
    console.print(
        Group(
            _layer_table(description),
            Text(),
            _part_table(description),
            Text(),
            _precision_table(description["precision"]),
            Text(),
            _memory_table(description),
            Text(),
            _bytes_table(description["bytes_each"]),
        )
    )
    for note in description["notes"]:
        console.print(Text(f"note: {note}"), soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    """Text in the first column, figures in the others."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def _layer_table(description: dict[str, Any]) -> RenderableType:
    table = _table(f"{description['model']}: layers", "tensor", "shape", "parameters")
    for layer in description["layers"]:
        table.add_section()
        times = f", {layer['count']} times" if layer["count"] > 1 else ""
        table.add_row(Text(layer["layers"] + times, style="bold"), "", Text(f"{layer['params']:,}", style="bold"))
        for name, shape in layer["tensors"].items():
            table.add_row(f"  {name.removesuffix('.weight')}", _times(shape), f"{math.prod(shape):,}")
    return table


def _times(shape: list[int]) -> str:
    return " × ".join(f"{extent:,}" for extent in shape)


def _part_table(description: dict[str, Any]) -> RenderableType:
    table = _table(
        f"parameters, and FLOPs a trained token at {description['sequence_length']:,} tokens a sequence",
        "part",
        "parameters",
        "FLOPs a token",
        "share",
    )
    for part in description["parts"]:
        table.add_row(
            part["part"].replace("_", " "),
            f"{part['params']:,}",
            _short(part["flops_per_token"]),
            f"{part['flops_share']:.1%}",
        )
    table.add_section()
    table.add_row("total", f"{description['total_params']:,}", _short(description["flops_per_token"]), "")
    table.add_row("active", f"{description['active_params']:,}", "", "")
    table.add_row("active without the input embedding", f"{description['active_params_without_embedding']:,}", "", "")
    cache = description["cache_elements_per_token"]
    size = f"{description['cache_bytes_per_token']:,} bytes in BF16"
    return Group(table, Text(f"cache while generating: {cache:,} elements a token, {size}"))


def _precision_table(precision: dict[str, Any]) -> RenderableType:
    table = Table(title=f"what is multiplied in what, precision={precision['name']}", title_justify="left")
    for column in ("layer", "forward", "input gradient", "weight gradient"):
        table.add_column(column, overflow="fold")
    for row in precision["rows"]:
        if "all" in row:
            table.add_row(row["layer"], row["all"])
        else:
            table.add_row(row["layer"], *(row[product] for product in ("forward", "input_gradient", "weight_gradient")))
    in_fp8 = next((row for row in precision["rows"] if "forward" in row), None)
    if in_fp8 is None:
        return table
    sums = f"FP8 products are summed in {in_fp8['accumulation']}, on this machine by the backend {in_fp8['backend']}"
    shapes = "a tile is 1 × 128 along the sum, a block 128 × 128; 2ⁿ: scales that are powers of two"
    return Group(table, Text(shapes), Text(sums))


def _memory_table(description: dict[str, Any]) -> RenderableType:
    content = description["memory"]
    checkpointing = ", activation checkpointing" if content["activation_checkpointing"] else ""
    table = _table(
        "training memory of one device",
        f"{content['batch']:,} tokens at once, {content['optimizer']}, {content['compute_dtype']}{checkpointing}",
        "GB (10⁹ bytes)",
    )
    for part in content["parts"]:
        table.add_row(part["part"].replace("_", " "), f"{part['bytes'] / 1e9:,.3f}")
    table.add_section()
    table.add_row("together", f"{content['bytes'] / 1e9:,.3f}")
    lines = [f"peak of a step: {content['peak_bytes'] / 1e9:,.3f} GB ({content['peak_moment']}); not all lives at once"]
    lines += ["weights, gradients and optimizer states are exact, the rest is an estimate that assumes:"]
    lines += [f"- {assumption}" for assumption in content["assumptions"]]
    return Group(table, *(Text(line) for line in lines))


def _bytes_table(ways: list[dict[str, Any]]) -> RenderableType:
    shown = ways[:1] if ways[0] == ways[1] else ways
    table = _table("bytes of each parameter, and of activations a token", "part", *(way["settings"] for way in shown))
    for part in ways[0]["per_parameter"]:
        table.add_row(part.replace("_", " "), *(f"{way['per_parameter'][part]:.2f}" for way in shown))
    table.add_section()
    table.add_row("activations a token", *(f"{way['activations_per_token']:,.0f}" for way in shown))
    return table


def _short(figure: float) -> str:
    """Four significant digits and the letter of the power of a thousand."""
    for letter, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if figure >= size:
            return f"{figure / size:.4g} {letter}"
    return f"{figure:.4g}"
