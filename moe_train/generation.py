"""Text from a trained model: greedy or sampled, one token at a time with a cache.

The caches hold what the attention kind stores a token (for MLA the compressed latent), so a prompt is read once and
each new token costs one position.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import UserError
from moe_train.model.attention import LayerCache
from moe_train.model.transformer import Transformer
from moe_train.training.checkpoints import checkpoint_paths, load_weights, open_checkpoint
from moe_train.training.run_folder import load_run_config


class Generated(NamedTuple):
    text: str  # prompt and continuation
    new_tokens: int
    seconds: float  # of the continuation and of reading the prompt


def load_for_generation(run: Path) -> tuple[Transformer, Tokenizer]:
    """The model of a run's newest checkpoint (or of the checkpoint given) in evaluation mode, and its tokenizer."""
    if not run.is_dir():
        raise UserError(f"run={run}: there is no such folder; give a run folder or one of its checkpoints/step_N")
    folder = run.parent.parent if run.parent.name == "checkpoints" else run
    config = load_run_config(folder)
    if run is not folder:
        checkpoint = open_checkpoint(run)
    elif paths := checkpoint_paths(run):
        checkpoint = open_checkpoint(paths[-1])
    else:
        raise UserError(f"run={run}: the run has no checkpoint yet; wait for one or lower checkpoint.every_steps")
    model = Transformer(config.model.resolved(), int(checkpoint.state["vocab_size"]))
    load_weights(checkpoint, model)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), tokenizer


@torch.no_grad()
def next_tokens(model: Transformer, prompt: list[int], temperature: float, seed: int, limit: int) -> Iterator[int]:
    """Token ids that follow `prompt`, at most `limit` of them; temperature 0 takes the likeliest."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    caches = [LayerCache() for _ in model.blocks]
    tokens_bt = torch.tensor([prompt], device=device)
    for _ in range(limit):
        logits_v: Tensor = model.logits(tokens_bt, caches)[0, -1].float()
        if temperature == 0:
            chosen = logits_v.argmax()
        else:
            chosen = torch.multinomial(torch.softmax(logits_v / temperature, -1), 1, generator=generator)[0]
        yield int(chosen)
        tokens_bt = chosen.view(1, 1)


def generate(
    model: Transformer, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int, temperature: float, seed: int
) -> Generated:
    """Continue `prompt` until the end-of-text token or `max_new_tokens`."""
    began = time.perf_counter()
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.eos_id]  # an empty prompt starts a new document
    new: list[int] = []
    for token in next_tokens(model, prompt_ids, temperature, seed, max_new_tokens):
        if token == tokenizer.eos_id:
            break
        new.append(token)
    text = prompt + tokenizer.decode(new)
    return Generated(text, len(new), time.perf_counter() - began)
