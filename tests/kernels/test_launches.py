"""How many kernels a step of a small model is on a GPU: it takes 5 to 6 µs for each on an H200, whatever the model
computes in them (docs/log.md, 2026-11-27).

Counted where Triton interprets: what torch dispatches that is no view, within the project's operators too, and
programs in Triton. Attention and grouped products in BF16 are torch's, of which a CPU takes others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from taken_kernels import taken
from triton.runtime.interpreter import GridExecutor

from moe_train.benchmark.arms import TrainingArm
from moe_train.compose import compose_run
from moe_train.cost.kernels import Kernels
from moe_train.precision import gpu_linear, grouped
from moe_train.precision.narrowed import Narrowed
from moe_train.training import optimizers
from moe_train.training.runtime import start_runtime

LAYERS = 2
SETTINGS = [
    "experiment=claim_gpu",
    f"model.num_hidden_layers={LAYERS}",
    "data.vocab_size=512",
    "batch_size=1",
    "data.sequence_length=16",
    "optimizer=adamw",
    "precision=bf16",
    "cpu_kernels=torch",
]


class Launches(TorchDispatchMode):
    """Counts while it is on."""

    count, _within = 0, False

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        allocates = "empty" in operation.__name__ or operation.__name__.startswith(("detach", "lift", "is_"))
        if not (self._within or operation.is_view or allocates or operation.namespace != "aten"):
            self.count += 1
        return out

    def of_triton(self, run: Callable[..., None]) -> Callable[..., None]:
        def counted(*args: Any, **kwargs: Any) -> None:
            self.count, self._within = self.count + 1, True
            try:
                run(*args, **kwargs)
            finally:
                self._within = False

        return counted


def launches_of_a_step(monkeypatch: pytest.MonkeyPatch, *settings: str) -> int:
    config = compose_run([*SETTINGS, *settings], "test", None)
    with taken(Kernels.TRITON, in_bf16=True), monkeypatch.context() as patch:
        patch.setattr(optimizers, "kernels_take", lambda parameters: True)
        patch.setattr(gpu_linear, "takes", lambda x, dtype, *weights: weights[0].dtype == torch.float32)
        patch.setattr(grouped, "widens_as_it_multiplies", lambda device: True)
        patch.setattr(grouped, "widened_product", lambda left, right: torch.zeros(len(left), right.shape[1]))
        arm = TrainingArm(config, start_runtime(config))
        arm._stepper._narrowed = Narrowed()
        arm.step()  # what it makes once
        counter = Launches()
        patch.setattr(GridExecutor, "__call__", counter.of_triton(GridExecutor.__call__))
        with counter:
            arm.step()
    return counter.count


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_mixture_adds_few_kernels_to_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = launches_of_a_step(monkeypatch)
    dense = launches_of_a_step(monkeypatch, "model.dense_twin_of_moe=equal_flops")
    assert dense <= 138
    assert mixture - dense <= LAYERS * 27
