"""The weights a run begins with, drawn or read: each process keeps what it holds of them, as it is spread already.

A model that is cut over processes is built without memory (torch's meta device) and gets its parts here, so no process
ever has all of it. Values are those of one process: all draw the same numbers in the same order, a weight at a time.
"""

from __future__ import annotations

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_train.errors import one_line
from moe_train.model.transformer import Transformer, drawn
from moe_train.parallel.spread import Parts
from moe_train.training.checkpoints import WEIGHTS, Checkpoint, check_same_tensors, damaged
from moe_train.training.spreading import Spreading


@torch.no_grad()
def draw_weights(model: Transformer, spread: Parts, seed: int) -> None:
    """As `Transformer.initialise`."""
    shapes = {name: spread.part(name).shape for name, _ in model.named_parameters()}
    for (name, shape), whole in zip(shapes.items(), drawn(shapes.values(), model.config.initializer_range, seed)):
        assert whole.shape == shape
        spread.local(name).copy_(spread.part(name).of(whole))


def read_weights_here(checkpoint: Checkpoint, model: Transformer, spread: Parts) -> None:
    """What this process holds of a checkpoint's weights, whatever layout wrote it. Raises UserError."""
    expected = {name: spread.part(name).shape for name, _ in model.named_parameters()}
    buffers = dict(model.named_buffers())
    expected |= {name: buffer.shape for name, buffer in buffers.items()}
    if checkpoint.in_shards:
        from moe_train.training.sharded_checkpoints import read_parts_of_weights

        read_parts_of_weights(checkpoint, Spreading(model, spread, []), expected)
        return
    try:
        with safe_open(checkpoint.path / WEIGHTS, "pt") as file, torch.no_grad():
            found = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            check_same_tensors(checkpoint.path, found, expected)
            for name in expected:
                here: Tensor = buffers[name] if name in buffers else spread.local(name)
                first, end = (0, len(here)) if name in buffers else spread.part(name)[1:]
                if first < end:
                    here.copy_(file.get_slice(name)[first:end])
    except (SafetensorError, OSError) as error:
        raise damaged(checkpoint.path, f"{WEIGHTS}: {one_line(error)}") from None
