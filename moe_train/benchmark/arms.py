"""An arm that trains: the project's own step on made-up tokens, without a run around it.

The learning rate is zero, so that the optimizer does all its work and every repetition computes the same: losses that
fall and experts that shift would make early rounds differ from late ones. The selection bias moves as in training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.benchmark.bench import made_up_tokens
from moe_train.config import RunConfig
from moe_train.cost.flops import training_flops_per_token
from moe_train.data.batches import Batches
from moe_train.model.transformer import Transformer
from moe_train.parallel.spread import Replicated
from moe_train.precision import recipes
from moe_train.training.optimizers import build_optimizers
from moe_train.training.runtime import Runtime
from moe_train.training.step import Stepper

_BATCHES = 4  # different ones, taken in turn


class TrainingArm:
    """The model, optimizers and batches of `config` on the runtime's device."""

    def __init__(self, config: RunConfig, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.model_config = config.model.resolved()
        self.vocab_size = config.vocab_size
        with runtime.device:
            self.model = Transformer(
                self.model_config, self.vocab_size, config.z_loss_weight, config.activation_checkpointing
            )
        _draw(self.model, config.seed)
        recipes.apply(self.model, config.precision, runtime.device)
        spread = Replicated(self.model, runtime.accelerator)
        self.optimizers = build_optimizers(self.model, config.optimizer, config.seed)
        batches = Batches(made_up_tokens(config, _BATCHES), config.data.sequence_length, config.batch_size, config.seed)
        self._stepper = Stepper(config, runtime, self.model, spread, self.optimizers, batches)
        self.batches = [self._stepper.load(step) for step in range(_BATCHES)]
        self.tokens = batches.num_targets(0)  # a step
        self.progress = 0.0
        self._steps = 0

    @property
    def flops_per_step(self) -> float:
        """The model's own."""
        length = self.config.data.sequence_length
        return self.tokens * training_flops_per_token(self.model_config, length, self.vocab_size)

    def rest_biases(self) -> None:
        """Leave the selection biases where they are from now on, as after `bias_update_fraction` of a run."""
        self.progress = 1.0

    def step(self) -> None:
        """A whole optimizer step."""
        self._step()

    def launched_step(self) -> None:
        """The same without a CUDA graph, whose memory and operations nobody sees."""
        self._step(replays=False)

    def _step(self, replays: bool = True) -> None:
        batch = self._steps % _BATCHES
        self._steps += 1
        self._stepper.step(batch, *self.batches[batch], 0.0, self.progress, replays=replays)

    def forward_backward(self) -> None:
        """The same without clipping, optimizer and balancing."""
        self._stepper.passes(0, *self.batches[0])
        self.model.zero_grad(set_to_none=True)

    def state(self) -> list[Tensor]:
        """Everything it holds between steps."""
        return held(self.model, self.optimizers) + [tensor for batch in self.batches for tensor in batch]


@torch.no_grad()
def _draw(model: Transformer, seed: int) -> None:
    """As a run's, but on the model's device: a CPU takes ten seconds for a billion numbers."""
    generator = torch.Generator(model.embedding.weight.device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0, model.config.initializer_range, generator=generator)


def held(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> list[Tensor]:
    """Weights, buffers and optimizer states."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    kept = [tensor for state in states for tensor in state.values() if isinstance(tensor, Tensor)]
    return [*model.parameters(), *model.buffers(), *kept]


def rates(tokens: int, seconds: list[float]) -> list[float]:
    """Tokens a second."""
    return [tokens / each for each in seconds]
