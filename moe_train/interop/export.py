"""From a run to a folder that transformers loads as one of its own architectures.

Weights are cut out of the mapped checkpoint a shard at a time: what is held beside the mapping is one shard, and that
only where a tensor is converted or its rows change places (373 MiB of weights in shards of 100 MB: 73 MiB at the peak
beside the mapping as they are, 165 MiB converted to BF16).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_train.config import ModelConfig
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import UserError, one_line
from moe_train.interop.families import choose_family
from moe_train.interop.family import Family
from moe_train.interop.importing import DTYPES
from moe_train.interop.model_card import model_card
from moe_train.interop.names import Place, empty_tensors, mtp_copies, places
from moe_train.model.transformer import Transformer
from moe_train.training.checkpoints import WEIGHTS, Checkpoint
from moe_train.training.new_folder import new_folder
from moe_train.training.run_folder import find_checkpoint, load_run_config
from moe_train.training.starting_weights import check_own_config

# One of each kind that tokenizers treat apart.
_PROBE = "Tokens of\n\tmany kinds: naïve 漢字, 3.14 != 2_718; <|x|> \x00 🙂"


@dataclass(frozen=True)
class Exported:
    """What an export made."""

    family: str
    architecture: str
    num_params: int
    dtype: str
    shards: int
    step: int
    mtp_modules: int


@dataclass(frozen=True)
class _Piece:
    """One tensor to be written: a place in one of ours, or nothing but a shape."""

    theirs: str
    ours: str | None
    place: Place | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_copy: bool = False  # of a tensor that is written under another name too

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    @property
    def num_elements(self) -> int:
        return torch.Size(self.shape).numel()


def export_run(
    run: Path,
    out: Path,
    *,
    family: str = "auto",
    dtype: Literal["stored", "float32", "bfloat16"] = "stored",
    mtp: Literal["keep", "drop"] | None = None,
    max_shard_bytes: float = 5e9,
) -> Exported:
    """Write `out` from a run folder's newest checkpoint, or the `checkpoints/step_N` given. Raises UserError.

    mtp: what becomes of MTP modules. transformers' loader knows where they are at published depths only and finds them
    unexpected elsewhere, so a model that has some is written on a clear word alone.
    """
    checkpoint = find_checkpoint(run, "run")
    folder = checkpoint.path.parent.parent
    config = load_run_config(folder)
    check_own_config(checkpoint, config)
    tokenizer = _load_tokenizer(folder)
    model = config.model.resolved()
    if mtp is None and model.mtp is not None:
        raise UserError(
            f"model.mtp.depth={model.mtp.depth} has no place in what transformers loads by default: mtp=drop writes "
            "the main model, whose predictions are the same without it, mtp=keep the modules as well, as published"
        )
    if mtp == "drop":
        model = dataclasses.replace(model, mtp=None)
    vocab_size = checkpoint.vocab_size
    with new_folder(out.absolute()) as temporary:
        with _opened(checkpoint) as stored:
            target = choose_family(model, family, biased=_biased(stored, model))
            pieces = _pieces(stored, checkpoint, model, target, vocab_size, dtype)
            shards = _in_shards(pieces, max_shard_bytes)
            _write_shards(temporary, stored, shards)
        kind = str(max(pieces, key=lambda piece: piece.num_bytes).dtype).removeprefix("torch.")
        eos_id, bos_id = (None, None) if tokenizer is None else (tokenizer.eos_id, tokenizer.bos_id)
        theirs = target.to_config(model, vocab_size, config.data.sequence_length, eos_id, bos_id)
        _write_json(temporary / "config.json", theirs | {"dtype": kind})
        generation = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": eos_id}
        _write_json(temporary / "generation_config.json", generation)
        if tokenizer is not None:
            tokenizer.save(temporary)
            _check_tokenizer(temporary, tokenizer)
        num_params = sum(piece.num_elements for piece in pieces if not (piece.is_copy or _is_bias(piece.theirs)))
        exported = Exported(
            target.model_type, target.architecture, num_params, kind, len(shards), checkpoint.step, model.mtp_depth
        )
        prefixed = tokenizer is not None and bool(tokenizer.prefix_ids)
        card = model_card(exported, theirs, config, checkpoint, folder, prefixed=prefixed)
        (temporary / "README.md").write_text(card)
    return exported


def _is_bias(theirs: str) -> bool:
    return theirs.endswith("e_score_correction_bias")


def _load_tokenizer(folder: Path) -> Tokenizer | None:
    """The run's; None of weights that were imported without one."""
    if not (folder / "tokenizer").exists() and (folder / "configs").exists():
        return None
    return Tokenizer.load(folder / "tokenizer")


def _opened(checkpoint: Checkpoint) -> Any:
    if checkpoint.in_shards:
        raise UserError(
            f"{checkpoint.path} was written in shards, by several processes: python scripts/consolidate.py "
            f"run={checkpoint.path} makes files of them, which can be exported"
        )
    try:
        return safe_open(checkpoint.path / WEIGHTS, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"the checkpoint {checkpoint.path} cannot be read ({one_line(error)}): export another one"
        ) from None


def _biased(stored: Any, model: ModelConfig) -> bool:
    return any(
        bool(stored.get_tensor(key).any())
        for key in stored.keys()  # noqa: SIM118 (no mapping)
        if key.endswith("router.selection_bias") and (model.mtp is not None or not key.startswith("mtp."))
    )


def _pieces(
    stored: Any, checkpoint: Checkpoint, model: ModelConfig, family: Family, vocab_size: int, dtype: str
) -> list[_Piece]:
    """Every tensor of the export, in the order of its layers."""
    with torch.device("meta"):
        expected = {key: tensor.shape for key, tensor in Transformer(model, vocab_size).state_dict().items()}
    held = {key: stored.get_slice(key) for key in stored.keys()}  # noqa: SIM118 (no mapping)
    parts = places(model, family.names)
    pieces = []
    for ours, shape in expected.items():
        if ours not in held or tuple(held[ours].get_shape()) != tuple(shape):
            raise UserError(
                f"the checkpoint {checkpoint.path} is not one of its run's config.yaml ({ours}): export another one"
            )
        kept = DTYPES[held[ours].get_dtype()]
        for place in parts[ours]:
            wanted = kept if dtype == "stored" or _is_bias(place.theirs) else getattr(torch, dtype)
            cut = torch.empty(shape, device="meta")[place.part]
            pieces.append(_Piece(place.theirs, ours, place, tuple(cut.shape), wanted))
    whole = {piece.ours: piece for piece in pieces}
    for theirs, ours in mtp_copies(model).items():
        pieces.append(dataclasses.replace(whole[ours], theirs=theirs, is_copy=True))
    for theirs, empty in empty_tensors(model, family.names):
        pieces.append(_Piece(theirs, None, None, empty, pieces[0].dtype))
    return pieces


def _in_shards(pieces: list[_Piece], max_bytes: float) -> list[list[_Piece]]:
    shards: list[list[_Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.num_bytes
    return shards


def _write_shards(folder: Path, stored: Any, shards: list[list[_Piece]]) -> None:
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        save_file(_cut(stored, shard), folder / name, metadata={"format": "pt"})  # written without another copy
    if len(shards) > 1:
        total = sum(piece.num_bytes for shard in shards for piece in shard)
        where = {piece.theirs: name for name, shard in zip(names, shards, strict=True) for piece in shard}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _cut(stored: Any, shard: list[_Piece]) -> dict[str, Tensor]:
    found, held = {}, {}
    for piece in shard:
        if piece.place is None or piece.ours is None:
            found[piece.theirs] = torch.empty(piece.shape, dtype=piece.dtype)
            continue
        if piece.ours not in held:
            held = {piece.ours: stored.get_tensor(piece.ours)}  # mapped, not read
        cut = piece.place.cut(held[piece.ours]).to(piece.dtype)
        found[piece.theirs] = cut.clone() if piece.is_copy else cut  # safetensors wants no memory twice
    return found


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _check_tokenizer(folder: Path, ours: Tokenizer) -> None:
    """transformers picks a class of its own for a tokenizer folder: make sure that it gives our ids."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    ids = theirs(_PROBE)["input_ids"]
    if (
        ids[: len(ours.prefix_ids)] != ours.prefix_ids
        or theirs(_PROBE, add_special_tokens=False)["input_ids"] != ours.encode(_PROBE)
        or theirs.eos_token_id != ours.eos_id
    ):
        raise UserError(
            "transformers reads the run's tokenizer differently (other ids for the same text), so the export would "
            "not work with it: copy the files of the tokenizer's publisher to the run's tokenizer/"
        )
