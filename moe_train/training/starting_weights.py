"""Whether weights belong to what is to be trained: the same text to go on, the same tokens and shape to start anew."""

from __future__ import annotations

import json
from typing import Any

from moe_train.config import ModelConfig, RunConfig, differences, model_digest, to_dict
from moe_train.data.packing import PreparedData
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import UserError
from moe_train.training.checkpoints import Checkpoint
from moe_train.training.run_folder import CONFIG, load_run_config


def check_same_text(checkpoint: Checkpoint, data: PreparedData) -> None:
    """Refuse to go on with a run on another text: its steps would no longer be those of one run."""
    there, here = checkpoint.corpus_fingerprint, data.fingerprint
    folder = checkpoint.path.parent.parent
    if there is None:
        raise UserError(
            f"{folder} is a starting point and no run: start one from it with init_from={folder} and another run_dir="
        )
    if there != here:
        raise UserError(
            f"{checkpoint.path} was trained on another text or tokenizer (fingerprint {there[:12]}, "
            f"here {here[:12]}): give the data.* settings it was trained with"
        )


def check_same_tokenizer(start: Checkpoint, data: PreparedData) -> None:
    """Refuse to start from weights to which the ids of `data` mean other tokens."""
    theirs = start.path.parent.parent / "tokenizer"
    if theirs.exists() and not Tokenizer.load(data.path).gives_same_ids_as(Tokenizer.load(theirs)):
        raise UserError(
            f"init_from={start.path} was trained with another tokenizer than data.tokenizer= gives: take its own, "
            f"data.tokenizer={theirs}"
        )


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of the run or the import that a checkpoint is of. Raises UserError with the remedy for each."""
    folder = checkpoint.path.parent.parent / "tokenizer"
    imported = str(checkpoint.state.get("origin", "")).startswith("imported")
    if imported and not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"there is no tokenizer in {folder}: weights imported without one cannot read or write text; "
            "import them again with tokenizer="
        )
    return Tokenizer.load(folder)


def check_own_config(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Refuse to read weights as another model than they were trained as, config.yaml having been changed since."""
    digest = checkpoint.state.get("model_digest")
    if digest is not None and digest != model_digest(config.model):
        raise UserError(
            f"{checkpoint.path.parent.parent / CONFIG} does not describe the model that {checkpoint.path.name} was "
            "trained as: put its model settings back"
        )


def check_same_shape(start: Checkpoint, model: ModelConfig) -> list[str]:
    """Refuse weights of a model of another shape, naming the setting; returns what else is set otherwise."""
    folder = start.path.parent.parent
    if not (folder / CONFIG).exists():
        return []
    theirs = load_run_config(folder).model.resolved()
    for key, there, here in differences(_shape(theirs), _shape(model), "model"):
        raise UserError(
            f"init_from={start.path} is of a model with {key}={json.dumps(there)}, and this one has "
            f"{json.dumps(here)}: give the settings of the model it is of"
        )
    unlike = differences(to_dict(theirs), to_dict(model), "model")
    return [f"{key}={json.dumps(here)} (there {json.dumps(there)})" for key, there, here in unlike if key not in _NAMES]


_NAMES = ("model.name", "model.vocab_size")


def _shape(model: ModelConfig) -> dict[str, Any]:
    """The settings that decide which weights there are; a router may choose differently over the same ones."""
    settings = to_dict(model)
    kept = ("attention", "hidden_size", "num_hidden_layers", "intermediate_size", "tie_word_embeddings")
    shape = {key: settings[key] for key in kept}
    shape["mtp.depth"] = model.mtp_depth
    experts = ("num_experts", "num_shared_experts", "moe_intermediate_size", "first_k_dense_replace")
    shape["moe"] = None if model.moe is None else {key: settings["moe"][key] for key in experts}
    return shape
