"""The model of a run, with what it was trained on and with: for everything that uses a run after its end."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from moe_train.config import RunConfig
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import UserError
from moe_train.gpu import takes_gpu
from moe_train.machine import cores_here
from moe_train.model.transformer import Transformer
from moe_train.training.checkpoints import Checkpoint, load_weights
from moe_train.training.run_folder import find_checkpoint, load_run_config
from moe_train.training.starting_weights import check_own_config, tokenizer_of


class TrainedModel(NamedTuple):
    model: Transformer  # in evaluation mode, FP32, on the GPU where one is taken
    tokenizer: Tokenizer
    config: RunConfig
    checkpoint: Checkpoint  # the weights' own
    folder: Path  # of the run


def load_trained(run: Path) -> TrainedModel:
    """The model of a run's newest checkpoint, or of the `checkpoints/step_N` given. Raises UserError."""
    checkpoint = find_checkpoint(run, "run")
    folder = checkpoint.path.parent.parent
    config = load_run_config(folder)
    check_own_config(checkpoint, config)
    model = Transformer(config.model.resolved(), checkpoint.vocab_size)
    load_weights(checkpoint, model)
    tokenizer = tokenizer_of(checkpoint)
    device = "cuda" if takes_gpu() else "cpu"
    return TrainedModel(model.to(device).eval(), tokenizer, config, checkpoint, folder)


def threads_of(config: RunConfig) -> int | None:
    """The run's own `num_threads`, unless it had more cores than this machine has."""
    return config.num_threads if (config.num_threads or 0) <= cores_here() else None


def load_for_generation(run: Path) -> TrainedModel:
    """`load_trained`, if text can be made with it. Raises UserError if it cannot."""
    trained = load_trained(run)
    moe = trained.model.config.moe
    if moe is not None and moe.routing == "expert_choice":
        raise UserError(
            f"run={run}: a model with moe.routing=expert_choice cannot generate text, since its experts choose among "
            "all tokens of a text, later ones too: train one with another model/moe"
        )
    return trained
