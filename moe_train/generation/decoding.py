"""Text from a model: greedy or sampled, one token at a time with a cache.

The caches hold what the attention kind stores a token (for MLA the compressed latent), so a prompt is read once and
each new token costs one position.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moe_train.data.tokenizer import Tokenizer
from moe_train.model.attention import LayerCache
from moe_train.model.transformer import Transformer


class Decoder(Protocol):
    """A way of continuing one prompt; made anew for each."""

    forward_passes: int  # of the main model so far, the one that reads the prompt included

    @property
    def caches(self) -> Sequence[LayerCache]: ...

    def tokens(self, prompt: list[int], limit: int) -> Iterator[int]:
        """Ids of the tokens that follow `prompt` (at least one id), exactly `limit` of them."""
        ...


class Generated(NamedTuple):
    text: str  # prompt and continuation
    new_tokens: int  # without the end-of-text token
    seconds: float  # of the continuation and of reading the prompt
    forward_passes: int
    cache_bytes: int  # of all caches at the end
    cache_elements_per_token: int  # over all layers that have a cache

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds


class PlainDecoder:
    """One token a pass; temperature 0 takes the likeliest, whatever the seed."""

    def __init__(self, model: Transformer, temperature: float = 0.0, seed: int = 0) -> None:
        self.model, self.temperature = model, temperature
        self.generator = torch.Generator(device_of(model)).manual_seed(seed)
        self.caches = [LayerCache() for _ in model.blocks]
        self.forward_passes = 0

    @torch.no_grad()
    def tokens(self, prompt: list[int], limit: int) -> Iterator[int]:
        tokens_bt = torch.tensor([prompt], device=device_of(self.model))
        for _ in range(limit):
            hidden_btd, _ = self.model.hidden(tokens_bt, self.caches)
            self.forward_passes += 1
            chosen = self._choose(self.model.scores(hidden_btd[:, -1:])[0, 0])
            yield int(chosen)
            tokens_bt = chosen.view(1, 1)

    def _choose(self, logits_v: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits_v.argmax()
        below_best = logits_v.float() - logits_v.max().float()
        probabilities = torch.softmax(below_best / max(self.temperature, 1e-6), -1)
        return torch.multinomial(probabilities, 1, generator=self.generator)[0]


def device_of(model: Transformer) -> torch.device:
    return model.embedding.weight.device


def generate(decoder: Decoder, tokenizer: Tokenizer, prompt: str, max_new_tokens: int) -> Generated:
    """Continue `prompt` until the end-of-text token or `max_new_tokens`."""
    began = time.perf_counter()
    prompt_ids = tokenizer.prefix_ids + tokenizer.encode(prompt)
    prompt_ids = prompt_ids or [tokenizer.eos_id]  # an empty prompt starts a new document
    new: list[int] = []
    for token in decoder.tokens(prompt_ids, max_new_tokens):
        if token == tokenizer.eos_id:
            break
        new.append(token)
    text = prompt + tokenizer.decode(new)
    return Generated(
        text,
        len(new),
        time.perf_counter() - began,
        decoder.forward_passes,
        sum(cache.bytes for cache in decoder.caches),
        sum(_elements_per_token(cache) for cache in decoder.caches),
    )


def _elements_per_token(cache: LayerCache) -> int:
    return sum(held.numel() // cache.length for held in cache.held or () if cache.length)
