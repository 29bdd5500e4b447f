"""What checkpoints keep of a model and its optimizers, under names that no layout changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_train.parallel.spread import Part, Parts
from moe_train.training.checkpoints import Checkpoint, load_optimizers

MODEL, _OPTIMIZER = "model.", "optimizer."


class Spreading(NamedTuple):
    """A model, how it is spread, and its optimizers."""

    model: nn.Module
    spread: Parts
    optimizers: list[torch.optim.Optimizer]

    def of_optimizers(self) -> Iterator[tuple[torch.optim.Optimizer, str, list[str]]]:
        """Each optimizer, how the names of its states begin, and the names of its parameters in its own order."""
        names = {self.spread.local(name): name for name, _ in self.model.named_parameters()}
        for number, optimizer in enumerate(self.optimizers):
            members = [names[local] for group in optimizer.param_groups for local in group["params"]]
            yield optimizer, f"{_OPTIMIZER}{number}.", members

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint keeps, by name."""
        found = {f"{MODEL}{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, _ in self.model.named_parameters():
            found[f"{MODEL}{name}"] = self.spread.as_saved(name, self.spread.local(name).data)
        for optimizer, prefix, members in self.of_optimizers():
            for name in members:
                for key, value in optimizer.state[self.spread.local(name)].items():
                    found[f"{prefix}{key}.{name}"] = self.spread.as_saved(name, value) if value.ndim else value
        return found

    def load_optimizers(self, checkpoint: Checkpoint) -> None:
        """Put back what this process holds of their states, whatever layout wrote them. Raises UserError."""
        if checkpoint.in_shards:
            from moe_train.training.sharded_checkpoints import load_spread_optimizers  # half a second to load

            load_spread_optimizers(checkpoint, self)
        else:
            parts: dict[Tensor, Part] = {
                self.spread.local(name): self.spread.part(name) for name, _ in self.model.named_parameters()
            }
            load_optimizers(checkpoint, self.optimizers, parts.__getitem__)
