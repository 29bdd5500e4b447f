"""Which text a model is trained on, and how it is cut into tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from moe_train.config.fields import STRICT, Positive, Size, require


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DataConfig:
    """What every corpus shares. `tokenizer`: `bpe` (trained on it), `bytes`, or a Hugging Face name or folder."""

    name: str
    tokenizer: str
    vocab_size: Size  # of the trained BPE
    sequence_length: Positive  # tokens a block predicts
    val_fraction: Annotated[float, Field(gt=0, lt=1)]  # of the documents, chosen by a hash of their text
    cache_dir: str | None  # None: the user's cache folder

    def __post_init__(self) -> None:
        require(
            self.tokenizer != "bpe" or self.vocab_size >= 257,
            f"vocab_size={self.vocab_size} is too small for byte-level BPE: it needs 256 bytes and an end token, "
            "so at least 257",
        )


@dataclass(frozen=True, config=STRICT, kw_only=True)
class LocalPythonConfig(DataConfig):
    """The source of the installed Python's standard library: real text that is on every machine."""

    kind: Literal["local_python"]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class LocalPackagesConfig(DataConfig):
    """The standard library and the Python source of every installed package."""

    kind: Literal["local_packages"]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TextFilesConfig(DataConfig):
    """Files of the user's own: txt (cut at blank lines), jsonl and parquet (one document a row)."""

    kind: Literal["text_files"]
    files: tuple[str, ...]  # globs
    val_files: tuple[str, ...]  # globs; empty: val_fraction of the documents of `files`
    text_field: str  # column of jsonl and parquet


@dataclass(frozen=True, config=STRICT, kw_only=True)
class HubConfig(DataConfig):
    """A dataset of the Hugging Face hub."""

    kind: Literal["hub"]
    dataset: str
    subset: str | None
    split: str
    val_split: str | None  # None: val_fraction of the documents of `split`
    text_field: str
    streaming: bool
    max_documents: Positive | None  # stop reading after as many documents of `split`


AnyDataConfig = Annotated[
    LocalPythonConfig | LocalPackagesConfig | TextFilesConfig | HubConfig,
    Field(discriminator="kind"),
]
