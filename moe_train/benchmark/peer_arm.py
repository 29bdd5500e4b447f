"""The same weights in transformers' own architecture, as a user of theirs would train them at their fastest.

Weights go through the project's export, so that theirs are read by their own loader. Stacked experts multiply through
grouped_mm, attention through SDPA, products run under BF16 autocast where ours do, AdamW is fused.

Weights in FP32, as ours are, have a price there: autocast does not reach their grouped_mm, which multiplies in the
format of the weights (transformers 5.24, integrations/moe.py). In BF16 (no master weights, AdamW's moments in BF16 too)
it multiplies in BF16: less is learned from small steps, and on a GPU more is trained a second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_train.benchmark.arms import TrainingArm, held
from moe_train.config import AdamWConfig
from moe_train.data.tokenizer import bytes_tokenizer
from moe_train.interop.export import export_run
from moe_train.training.starting_point import starting_config, write_starting_point


class PeerArm:
    """`ours` exported into `folder` and loaded by transformers, on the same batches, its weights in FP32 or BF16."""

    def __init__(self, ours: TrainingArm, folder: Path, weights: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        adamw = ours.config.optimizer
        if not isinstance(adamw, AdamWConfig):
            raise TypeError(f"transformers is compared with AdamW, not {adamw.kind}")
        self.architecture = exported(ours, folder)
        self.runtime, self.batches, self.tokens = ours.runtime, ours.batches, ours.tokens
        self.autocasts = weights is torch.float32 and self.runtime.dtype is torch.bfloat16
        config = ours.config
        self._rows = config.micro_batch_size or config.batch_size
        self._max_norm = config.optimizer.max_grad_norm or float("inf")
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            str(folder / "hf"),
            dtype=weights,
            attn_implementation="sdpa",
            trust_remote_code=False,
            local_files_only=True,
            **({"experts_implementation": "grouped_mm"} if config.model.moe is not None else {}),
        )
        self.model = model.to(self.runtime.device).train()
        # The rate is zero, as ours is: every repetition computes the same.
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=0.0,
            betas=adamw.betas,
            eps=adamw.eps,
            weight_decay=adamw.weight_decay,
            fused=True,
        )
        self._compiled: Callable[..., Any] | None = None
        self._steps = 0

    def step(self) -> None:
        """A whole optimizer step."""
        self._step(self.model)

    def compiled_step(self) -> None:
        """The same through torch.compile; the first call compiles."""
        if self._compiled is None:
            self._compiled = torch.compile(self.model)
        self._step(self._compiled)

    def _step(self, model: Callable[..., Any]) -> None:
        inputs, targets = self.batches[self._steps % len(self.batches)]
        self._steps += 1
        for piece, target in zip(inputs.split(self._rows), targets.split(self._rows)):
            with torch.autocast(self.runtime.device_type, torch.bfloat16, enabled=self.autocasts):
                loss = self.loss(model, piece, target)
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self._max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def loss(self, model: Callable[..., Any], inputs: Tensor, targets: Tensor) -> Tensor:
        """Summed over the tokens given and divided by those of a step; our targets are shifted already."""
        out = model(
            input_ids=inputs, labels=targets, shift_labels=targets, num_items_in_batch=self.tokens, use_cache=False
        )
        loss: Tensor = out.loss
        return loss

    def state(self) -> list[Tensor]:
        """Everything it holds between steps."""
        return held(self.model, [self._optimizer]) + [tensor for batch in self.batches for tensor in batch]


def exported(ours: TrainingArm, folder: Path) -> str:
    """Write the weights of `ours` as transformers' into `folder`/hf; returns the architecture.

    Raises UserError where none of theirs computes the same.
    """
    model = dataclasses.replace(ours.model_config, name="exported", vocab_size=ours.vocab_size)
    named = starting_config(model, folder / "ours" / "tokenizer", ours.config.data.sequence_length)
    weights = {key: tensor.contiguous() for key, tensor in ours.model.state_dict().items()}
    write_starting_point(folder / "ours", named, weights, bytes_tokenizer(), "weights of a benchmark")
    return export_run(folder / "ours", folder / "hf").architecture
