"""Text to token ids and back: a byte-level BPE trained on the corpus, plain bytes, or a tokenizer of the hub.

All three are a `tokenizers.Tokenizer` with one end-of-text token, so that everything after this file is one path. A
folder holds it as Hugging Face's tools expect it (`tokenizer.json`, and the end token's name in
`tokenizer_config.json`), so a saved tokenizer can be given as `data.tokenizer` and to `AutoTokenizer`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from moe_train.errors import UserError, one_line

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """A `tokenizers.Tokenizer` that adds no special tokens and reads special tokens in a text as ordinary text.

    prefix_ids: what a published tokenizer sets before a text (mostly one token that begins it), for prompts of models
    that expect it. Training text has none: documents are told apart by the end token alone.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_token: str, bos_token: str | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        # A document that speaks of "<|endoftext|>" does not end there. Not part of tokenizer.json, so set here.
        backend.encode_special_tokens = True
        self._backend = backend
        self._eos_token = eos_token
        eos_id = backend.token_to_id(eos_token)
        if eos_id is None:
            raise UserError(
                f"the end token {eos_token!r} is not in the tokenizer's vocabulary: choose another data.tokenizer"
            )
        self.eos_id: int = eos_id
        self._bos_token = bos_token
        self.bos_id: int | None = None if bos_token is None else backend.token_to_id(bos_token)
        plain, with_special = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        starts = (i for i in range(len(with_special)) if with_special[i : i + len(plain)] == plain)
        self.prefix_ids: list[int] = with_special[: next(starts, 0)]
        # Some published tokenizers leave ids out: the embedding must reach the largest.
        self.vocab_size: int = 1 + max(backend.get_vocab().values())

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores (unless TOKENIZERS_PARALLELISM=false)."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are not UTF-8 (a prefix may end inside a character) become U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=False)

    def gives_same_ids_as(self, other: Tokenizer) -> bool:
        """Whether every token has the same id in both, so that a model of one can read the text of the other."""
        return bool(self._backend.get_vocab() == other._backend.get_vocab())

    def save(self, folder: Path) -> None:
        self._backend.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._eos_token}
        if self._bos_token is not None:
            settings["bos_token"] = self._bos_token
        (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """From the folder it was saved in, or the tokenizer.json there. Raises UserError if there is none."""
        folder = path.parent if path.name == "tokenizer.json" else path
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"there is no tokenizer in {folder}: put back the one the weights were trained with")
        try:
            settings = json.loads((folder / "tokenizer_config.json").read_text())
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            return cls(backend, settings["eos_token"], settings.get("bos_token"))
        except UserError:
            raise
        except Exception as error:  # the library's own reader raises plain Exception
            raise UserError(
                f"the tokenizer in {folder} cannot be read ({one_line(error)}): put back the one it was trained with"
            ) from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (GPT-2's scheme) of at most `vocab_size` tokens. The same texts give the same tokenizer.

    Pairs seen only once are not merged: on a small corpus they would make whole lines of it into tokens.
    """
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, END_OF_TEXT)


def bytes_tokenizer() -> Tokenizer:
    """Token i is byte i; 256 ends a text."""
    # The byte-level alphabet writes a printable byte as itself and the others, in order, as characters from U+0100 on.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: ord(character) for character in alphabet if ord(character) < 256}
    others = sorted(set(range(256)) - set(vocab.values()))
    vocab |= zip(alphabet[len(vocab) :], others, strict=True)
    backend = _byte_level(models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return Tokenizer(backend, END_OF_TEXT)


def pretrained_tokenizer(
    name: str, key: str = "data.tokenizer", otherwise: str = "give data.tokenizer=bpe"
) -> Tokenizer:
    """A tokenizer of the hub by its name, or of a local folder. No remote code is run.

    key: the setting it was given as; otherwise: what else can be given, for the messages.
    """
    path = os.path.expanduser(name)
    # The hub's own client tries six times for each of a tokenizer's files before it gives up.
    known_here_only = not os.path.isdir(path) and not _hub_answers(name)
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=known_here_only)
    except Exception as error:  # a damaged file ends in whatever its reader stumbles over
        if known_here_only:
            raise UserError(
                f"{key}={name} is no folder here and not in the hub's cache, and the hub cannot be reached: "
                f"check the name and the network, or {otherwise}"
            ) from error
        raise UserError(
            f"{key}={name}: cannot load it ({one_line(error)[:200]}): check the name, or {otherwise}"
        ) from error
    if not found.is_fast:
        raise UserError(f"{key}={name} has no tokenizer.json (only a slow Python version): {otherwise}, or another")
    if found.eos_token is None:
        raise UserError(f"{key}={name} has no end-of-text token (eos_token): {otherwise}, or another")
    return Tokenizer(found.backend_tokenizer, found.eos_token, found.bos_token)


def _hub_answers(name: str) -> bool:
    """Whether the hub says anything of `name`, be it that there is no such thing. Asked once."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(name, "tokenizer_config.json"), timeout=10)
    except HfHubHTTPError:
        return True
    except Exception:  # no network, offline by a setting, no name the hub could have: types of three libraries
        return False
    return True


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend
