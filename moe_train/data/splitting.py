"""Which documents a corpus has, each once, and which of them are for validation.

Whether a document is for validation is decided by a hash of its text, never by where it stands: growing a corpus moves
no document from one side to the other, and nothing stands on both.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from moe_train.config import AnyDataConfig
from moe_train.data.corpora import documents, validation_documents


class Document(NamedTuple):
    text: str
    size: int  # UTF-8 bytes
    digest: bytes  # of the text, 16 bytes
    validation: bool


class DistinctDocuments:
    """Every document of a corpus once; `dropped` counts what was read and left out so far.

    A validation source of its own comes first, so what stands in it is kept out of training.
    """

    def __init__(self, config: AnyDataConfig) -> None:
        self.dropped = 0
        self._config = config

    def __iter__(self) -> Iterator[Document]:
        own = validation_documents(self._config)
        stream = itertools.chain(
            ((True, text) for text in own or ()), ((False, text) for text in documents(self._config))
        )
        seen = {_digest(b"")}  # an empty document has nothing to predict
        for from_own, text in stream:
            data = text.encode()
            digest = _digest(data)
            if digest in seen:
                self.dropped += 1
                continue
            seen.add(digest)
            chosen = own is None and int.from_bytes(digest[:8]) / 2**64 < self._config.val_fraction
            yield Document(text, len(data), digest, from_own or chosen)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
