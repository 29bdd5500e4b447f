"""What a run is made of, put together in the order in which one needs the other.

    run folder → data → model → precision → layout → its weights → optimizers and their states → stepper

Weights come after the model is spread over processes: each reads or draws what it holds.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.optim import Optimizer

from moe_train.config import ModelConfig, RunConfig
from moe_train.data.batches import Batches
from moe_train.data.packing import PreparedData, prepare
from moe_train.errors import UserError
from moe_train.model.transformer import Transformer
from moe_train.parallel.agreement import check_same_text_everywhere
from moe_train.parallel.signs_of_life import SignsOfLife
from moe_train.precision import recipes
from moe_train.training.account import Account
from moe_train.training.checkpoints import Checkpoint
from moe_train.training.fp8_health import Fp8Health, precision_notes
from moe_train.training.optimizers import build_optimizers
from moe_train.training.run_folder import RunFolder
from moe_train.training.runtime import Runtime
from moe_train.training.spreading import Spreading
from moe_train.training.starting_weights import check_same_shape, check_same_text, check_same_tokenizer
from moe_train.training.step import Stepper
from moe_train.training.weights import draw_weights, read_weights_here

if TYPE_CHECKING:
    from moe_train.training.sharded_checkpoints import Saver


class Shared(NamedTuple):
    """What all processes know of the run's folder, which rank 0 has opened."""

    path: Path
    checkpoint: Checkpoint | None  # that it goes on from
    start: Checkpoint | None  # of another run, whose weights it begins with
    fresh: bool  # nothing was in it
    signs: SignsOfLife | None  # of the other processes, where there are some


def known_to_all(runtime: Runtime, folder: RunFolder | None) -> Shared:
    """`folder` is rank 0's; the others have none."""
    path: Path = runtime.from_main(folder.path if folder else None)
    checkpoint: Checkpoint | None = runtime.from_main(folder.checkpoint if folder else None)
    start: Checkpoint | None = runtime.from_main(folder.start if folder else None)
    fresh: bool = runtime.from_main(folder is not None and folder.fresh)
    return Shared(path, checkpoint, start, fresh, SignsOfLife(path, runtime.rank) if runtime.world_size > 1 else None)


@dataclass(frozen=True)
class Parts:
    """On every process."""

    data: PreparedData
    batches: Batches
    model_config: ModelConfig
    model: Transformer
    compute_format: str
    fp8_health: Fp8Health
    optimizers: list[Optimizer]
    saver: Saver | None  # where every process saves its part
    stepper: Stepper
    step: int | None  # of the checkpoint it goes on from
    train_loss: float | None  # as last logged before that
    notes: list[str]  # for people, before the first step


def put_together(
    config: RunConfig, runtime: Runtime, folder: RunFolder | None, account: Account, shared: Shared
) -> Parts:
    """Raises UserError."""
    path, checkpoint, start, _, signs = shared
    resumed: dict[str, Any] | None = checkpoint.state if checkpoint else None

    data = prepare(config.data, progress=runtime.is_main)
    if runtime.world_size > 1:
        check_same_text_everywhere(data.fingerprint)
    batches = Batches(data.train, config.data.sequence_length, config.batch_size, config.seed, config.batch_ramp)
    model_config, vocab_size = config.model.resolved(), vocabulary(config, data)
    notes = _check_weights(config, data, checkpoint, start)
    with torch.device("meta") if runtime.cuts else contextlib.nullcontext():
        model = Transformer(model_config, vocab_size, config.z_loss_weight, config.activation_checkpointing)

    products = recipes.apply(model, config.precision, runtime.device)
    account.set_work(vocab_size, None if products is None else products.backend.multiplies_in)
    compute_format = str(runtime.dtype).removeprefix("torch.")
    fp8_health = Fp8Health(config.precision, model, runtime.device, compute_format, resumed)
    if fp8_health.in_compute_format:
        account.formats_changed()

    spread, part = runtime.spread_out(model)
    if (source := checkpoint or start) is None:
        draw_weights(model, spread, config.seed)
    else:
        read_weights_here(source, model, spread)
    optimizers = build_optimizers(
        model,
        config.optimizer,
        config.seed,
        local=spread.local,
        whole=spread.whole_matrices,
        copies=spread.copies,
        part=part,
    )
    spreading = Spreading(model, spread, optimizers)
    saver = None
    if runtime.cuts:
        from moe_train.training.sharded_checkpoints import Saver  # half a second to load

        runtime.accelerator.wait_for_everyone()
        if signs is not None:
            signs.check_shared()
        saver = Saver(path, spreading, runtime.new_host_group(), config.checkpoint.keep_last)
    stepper = Stepper(config, runtime, model, spread, optimizers, batches, fp8_health.counts)

    if checkpoint is not None:
        spreading.load_optimizers(checkpoint)
        notes.append(f"going on from step {checkpoint.step:,} of {path}")
        notes += precision_notes(folder.precision_before if folder else None, config.precision, checkpoint.state)
    if folder is None:  # rank 0 has done so with its ledger
        account.take_up(resumed)
    elif not folder.fresh and checkpoint is None:
        notes.append(f"{path} has no checkpoint: the run starts again from its first step")
    said = [*runtime.notes, *account.notes, *([] if products is None else [products.note])]
    if fp8_health.in_compute_format:
        wide = ", ".join(fp8_health.in_compute_format)
        said.append(f"FP8: these modules went back to {compute_format} earlier and stay there: {wide}")
    if model_config.moe is not None and model_config.moe.routing == "expert_choice":
        said.append("experts choose tokens, looking at later ones too: losses are lower than predictions would earn")
    return Parts(
        data,
        batches,
        model_config,
        model,
        compute_format,
        fp8_health,
        optimizers,
        saver,
        stepper,
        step=checkpoint.step if checkpoint else None,
        train_loss=resumed["train_loss"] if resumed else None,
        notes=[*said, *notes],
    )


def _check_weights(
    config: RunConfig, data: PreparedData, checkpoint: Checkpoint | None, start: Checkpoint | None
) -> list[str]:
    """That what it goes on from, or the other run it starts from, belongs to it; and what to say of that."""
    if checkpoint is not None:
        check_same_text(checkpoint, data)
        return []
    if start is None:
        return []
    check_same_tokenizer(start, data)
    used_otherwise = check_same_shape(start, config.model.resolved())
    notes = [f"starting from the weights of {start.path}"]
    return notes + ([f"not as its model had it: {', '.join(used_otherwise)}"] if used_otherwise else [])


def vocabulary(config: RunConfig, data: PreparedData) -> int:
    """The model's vocabulary: the tokenizer's rounded up to a multiple of 64, which matrix units like, or as given."""
    given = config.model.vocab_size
    if given is None:
        return -(-data.vocab_size // 64) * 64
    if given < data.vocab_size:
        raise UserError(
            f"model.vocab_size={given} is less than the tokenizer's {data.vocab_size}: raise it or leave it null"
        )
    return given
