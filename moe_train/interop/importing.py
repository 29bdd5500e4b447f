"""From a transformers folder to a starting point: configuration, tokenizer and weights, read shard by shard.

At any time at most our copy of the weights and one of their shards are in memory; the shard is mapped, so that the
system can drop it (373 MiB of weights in four shards: 443 MiB at the peak beside the mapping, all else included).
Nothing is guessed: a setting that has no place here, a tensor missing or left over ends the import.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_train.compose import validated
from moe_train.config import ModelConfig, MTPConfig
from moe_train.data.tokenizer import Tokenizer, bytes_tokenizer, pretrained_tokenizer
from moe_train.errors import UserError, one_line
from moe_train.interop.families import FAMILIES
from moe_train.interop.family import Family
from moe_train.interop.names import Names, Place, mtp_copies, places
from moe_train.model.transformer import Transformer
from moe_train.training.new_folder import check_free
from moe_train.training.starting_point import check_name, starting_config, write_starting_point

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Imported:
    """What an import made, and what is to be known of it."""

    family: str
    name: str
    num_params: int
    command: str  # that trains from it
    notes: list[str]


def import_model(hf: Path, out: Path, name: str | None = None, tokenizer: str | None = None) -> Imported:
    """Write `out` as a starting point with the weights of the folder `hf`. Raises UserError."""
    if not hf.is_dir():
        raise UserError(f"hf={hf}: there is no such folder; give one with config.json and *.safetensors")
    check_free(out)
    name = name or re.sub(r"[^A-Za-z0-9_-]+", "_", hf.absolute().name)
    check_name(name)
    family, theirs = read_config(hf)
    where = str(hf / "config.json")
    try:
        settings = family.to_settings(theirs, name, where)
        length = int(theirs["max_position_embeddings"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} has a value of the wrong kind ({one_line(error)}): fetch it again") from None
    if not 0 < length <= 10**9:
        raise UserError(f"{where}: max_position_embeddings={length} is no length: fetch it again")
    model = validated(ModelConfig, settings, where)
    vocab_size = int(theirs["vocab_size"])
    found = _tokenizer(hf, tokenizer, vocab_size)
    model, weights, notes = read_weights(hf, model, family.names_of(theirs), vocab_size, mtp=family.mtp)
    if theirs.get("attention_dropout"):
        notes.append(f"left out: attention_dropout={theirs['attention_dropout']}, which training here does not have")
    if found is None:
        notes.append(
            "there is no tokenizer.json: text is generated only with tokenizer=, and training takes data.tokenizer="
        )
    config = starting_config(model, out.absolute() / "tokenizer", length)
    origin = f"imported from {hf.absolute().name} ({family.architecture})"
    command = write_starting_point(out, config, weights, found, origin)
    num_params = sum(t.numel() for key, t in weights.items() if not key.endswith("selection_bias"))
    return Imported(family.model_type, name, num_params, command, notes)


def read_config(hf: Path) -> tuple[Family, dict[str, Any]]:
    """The family of a folder and its configuration, with transformers' defaults filled in."""
    path = hf / "config.json"
    try:
        raw = json.loads(path.read_text())
        architectures = raw.get("architectures") or []
        architectures = architectures if isinstance(architectures, list) else [architectures]
    except FileNotFoundError:
        raise UserError(f"hf={hf} has no config.json: give the folder of a transformers model") from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        raise UserError(f"{path} cannot be read: fetch it again") from None
    family = next((f for f in FAMILIES if [f.architecture] == architectures), None)
    if family is None or raw.get("model_type") != family.model_type:
        known = ", ".join(f.architecture for f in FAMILIES)
        asked = ", ".join(map(str, architectures)) or raw.get("model_type") or "none named"
        raise UserError(f"{path}: the architecture ({asked}) is not known here: choose one of {known}")
    if raw.get("quantization_config") is not None:
        raise UserError(f"{path}: the weights are quantised, which loses what training needs: choose a BF16 version")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(hf), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a strict dataclass of theirs: any type of error
        raise UserError(f"{path} is not one that transformers accepts: {one_line(error)[:300]}") from None
    theirs = config.to_dict() | {key: getattr(config, key) for key in config.attribute_map}
    return family, theirs


def _tokenizer(hf: Path, given: str | None, vocab_size: int) -> Tokenizer | None:
    """The folder's or the one given (a name, a folder, or `bytes`); None if there is neither."""
    if given is None and not (hf / "tokenizer.json").exists():
        return None
    if given == "bytes":
        tokenizer = bytes_tokenizer()
    else:
        tokenizer = pretrained_tokenizer(given or str(hf), "tokenizer", "give tokenizer=FOLDER or tokenizer=bytes")
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}: give tokenizer= with its own"
        )
    return tokenizer


# ------------------------------------------------------------------------------------------------------------ weights


def read_weights(
    hf: Path, model: ModelConfig, names: Names, vocab_size: int, *, mtp: bool = False
) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """All tensors of our model, in their dtypes, and notes on what was left out. Raises UserError.

    mtp: take the MTP modules that are there; the model is returned with as many.
    """
    files = _files(hf)
    dtypes = _headers(files)
    if mtp and model.moe is not None:
        model = _with_mtp(model, files, dtypes)
    with torch.device("meta"):
        ours = {key: tensor.shape for key, tensor in Transformer(model, vocab_size).state_dict().items()}
    where = places(model, names)
    weights = {key: _allocate(shape, where[key], dtypes, hf) for key, shape in ours.items()}
    wanted = {place.theirs: (key, place) for key, parts in where.items() for place in parts}
    notes = _check_left_over(dtypes, wanted, model, hf)
    if model.mtp is not None:
        notes.append(
            f"with {model.mtp_depth} MTP module(s), to be trained on with λ={model.mtp.loss_weight}, then "
            f"{model.mtp.late_loss_weight}, unless model.mtp.* says otherwise"
        )
    for file in files:
        with _opened(file) as shard:
            for theirs in shard.keys():  # noqa: SIM118 (no mapping)
                if theirs in wanted:
                    key, place = wanted[theirs]
                    _fill(weights[key], place, _tensor(shard, theirs, file), file)
    if model.tie_word_embeddings and "lm_head.weight" in dtypes:
        _check_tied(files, weights["embedding.weight"], hf)
    return model, weights, notes


def _files(hf: Path) -> list[Path]:
    single, index = hf / "model.safetensors", hf / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index} cannot be read: fetch it again") from None
        for name in names:
            if Path(name).name != name or not (hf / name).exists():
                raise UserError(f"{index} names {name}, which is not in the folder: fetch it again")
        return [hf / name for name in names]
    others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in hf.glob(pattern))
    if others:
        raise UserError(f"hf={hf} has {others[0]} and no safetensors, which alone are read: convert it to safetensors")
    raise UserError(f"hf={hf} has no model.safetensors: fetch the weights")


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from None


def _tensor(shard: Any, name: str, file: Path) -> Tensor:
    try:
        tensor: Tensor = shard.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from None
    return tensor


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} is damaged ({one_line(error)}): fetch it again")


def _headers(files: list[Path]) -> dict[str, torch.dtype]:
    """The dtype of each tensor with elements; those without stand for modules that are not there."""
    found = {}
    for file in files:
        with _opened(file) as shard:
            for name in shard.keys():  # noqa: SIM118 (no mapping)
                part = shard.get_slice(name)
                if 0 in part.get_shape():
                    continue
                dtype = part.get_dtype()
                if dtype not in DTYPES:
                    raise UserError(
                        f"{file}: {name} is {dtype}, and only F32, F16 and BF16 are read: choose such weights"
                    )
                found[name] = DTYPES[dtype]
    return found


def _with_mtp(model: ModelConfig, files: list[Path], dtypes: Mapping[str, torch.dtype]) -> ModelConfig:
    """The model with the MTP modules that follow its last layer and share its embedding and head, if there are any."""
    depth = 0
    while f"model.layers.{model.num_hidden_layers + depth}.eh_proj.weight" in dtypes:
        deeper = dataclasses.replace(model, mtp=MTPConfig(depth + 1, **_MTP_WEIGHTS))
        if not _are_copies(mtp_copies(deeper), files):
            break
        model, depth = deeper, depth + 1
    return model


# DeepSeek-V3's; no configuration has them.
_MTP_WEIGHTS = {"loss_weight": 0.3, "late_loss_weight": 0.1, "late_from": 0.676}


def _are_copies(copies: Mapping[str, str], files: list[Path]) -> bool:
    """Whether every one of `copies` that is there is equal to what it is a copy of."""
    originals = {"embedding.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
    where: dict[str, Path] = {}
    for file in files:
        with _opened(file) as shard:
            where |= dict.fromkeys(shard.keys(), file)

    def tensor(name: str) -> Tensor:
        with _opened(where[name]) as shard:
            return _tensor(shard, name, where[name])

    return all(
        torch.equal(tensor(copy), tensor(originals[ours]))
        for copy, ours in copies.items()
        if copy in where and originals[ours] in where
    )


def _allocate(shape: torch.Size, parts: list[Place], dtypes: Mapping[str, torch.dtype], hf: Path) -> Tensor:
    """Room for one of our tensors, in the dtype of its parts (the wider where they differ); zeros where it has none."""
    if not parts:
        return torch.zeros(shape)
    for place in parts:
        if place.theirs not in dtypes:
            raise UserError(f"hf={hf}: the tensor {place.theirs} is missing: fetch the folder again")
    dtype = dtypes[parts[0].theirs]
    for place in parts[1:]:
        dtype = torch.promote_types(dtype, dtypes[place.theirs])
    return torch.empty(shape, dtype=dtype)


def _fill(ours: Tensor, place: Place, theirs: Tensor, file: Path) -> None:
    expected = ours[place.part].shape
    if theirs.shape != expected:
        raise UserError(
            f"{file}: {place.theirs} is {tuple(theirs.shape)} and config.json makes it {tuple(expected)}: "
            "fetch the folder again"
        )
    if not bool(theirs.isfinite().all()):
        raise UserError(f"{file}: {place.theirs} has values that are not finite: fetch the folder again")
    place.fill(ours, theirs)


def _check_left_over(found: Mapping[str, Any], wanted: Mapping[str, Any], model: ModelConfig, hf: Path) -> list[str]:
    """Notes on tensors that are rightly left out. Raises UserError for one that our model has no place for."""
    depths = set()
    for name in sorted(set(found) - set(wanted) - set(mtp_copies(model))):
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        # Where DeepSeek-V3 and GLM keep MTP modules, which are known by how they join hidden state and embedding.
        if (
            layer
            and f"{layer[0]}eh_proj.weight" in found
            and int(layer[1]) >= model.num_hidden_layers + model.mtp_depth
        ):
            depths.add(layer[1])
        elif name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.tie_word_embeddings):
            continue  # both follow from the rest
        else:
            raise UserError(f"hf={hf}: the tensor {name} has no place here: choose a model without it")
    return [
        f"left out: MTP module model.layers.{depth} (taken are those of mixtures that share embedding and head)"
        for depth in sorted(depths, key=int)
    ]


def _check_tied(files: list[Path], embedding: Tensor, hf: Path) -> None:
    for file in files:
        with _opened(file) as shard:
            if "lm_head.weight" in shard.keys() and not torch.equal(  # noqa: SIM118 (no mapping)
                _tensor(shard, "lm_head.weight", file), embedding
            ):
                raise UserError(
                    f"hf={hf}: config.json ties the embeddings and lm_head.weight differs from them: "
                    "set tie_word_embeddings to false there"
                )
