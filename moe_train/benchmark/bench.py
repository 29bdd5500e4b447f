"""What every suite is given: the user's settings, the device, and how much time to take.

A suite composes its runs from its usual settings and the user's on top, with the keys of `train.py`. Its tokens are
made up, as frequent as words are in text (the law of Zipf and Mandelbrot), so that nothing has to be prepared.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from moe_train.compose import compose_run, key_of
from moe_train.config import MoEConfig, RunConfig
from moe_train.errors import UserError
from moe_train.training.runtime import Runtime


@dataclass(frozen=True)
class Effort:
    """How much time a comparison takes: rounds at most, and seconds after which three rounds are enough."""

    rounds: int = 9
    budget_seconds: float = 60.0
    shortest_seconds: float = 0.05  # of one measurement of a kernel


@dataclass(frozen=True)
class Bench:
    """`suite` is the name that figures are filed under."""

    suite: str
    given: tuple[str, ...]  # overrides as the user gave them
    config_dir: Path | None
    runtime: Runtime
    effort: Effort
    compiles_peer: bool | None = None  # None: in suite=peer, not in smoke
    launches: bool = True  # the real command as well, for what a run spends beside its steps

    @property
    def on_gpu(self) -> bool:
        return self.runtime.device_type == "cuda"

    def config(self, *usual: str, without: Sequence[str] = ()) -> RunConfig:
        """The run of the suite's usual overrides and the user's, which win; `without`: groups the suite decides on."""
        given = [override for override in self.given if _group(override) not in without]
        return compose_run(with_usual(usual, given), "benchmark", self.config_dir)

    def overrides(self, *usual: str) -> list[str]:
        """The same for a command line."""
        folder = [] if self.config_dir is None else ["--config-dir", str(self.config_dir.absolute())]
        return [*folder, *with_usual(usual, self.given)]

    def let_go(self) -> None:
        """Give back what is no longer used: a run that is launched finds the memory of the GPU free."""
        self.runtime.accelerator.free_memory()  # it keeps every model that it prepared
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def filed_under(self, suite: str) -> Bench:
        return dataclasses.replace(self, suite=suite)


def with_usual(usual: Sequence[str], given: Sequence[str]) -> list[str]:
    """Usual settings that are not given otherwise, then the given ones. Another model brings settings of its own."""
    keys = {key_of(override) for override in given}
    kept = [o for o in usual if key_of(o) not in keys and not ("model" in keys and _group(o) == "model")]
    return [*kept, *given]


def _group(override: str) -> str:
    return key_of(override).split("/")[0].split(".")[0]


def said_in_full(of: str, bench: Bench, said: Sequence[str]) -> str:
    """What was measured, with the given settings that `of` does not speak of and which kernels a CPU ran in BF16.

    `said`: keys that it does speak of. Figures of other settings are of something else, and do not replace each other.
    """
    runtime = bench.runtime
    said = (*said, "num_threads", "cpu_kernels") if of else ("num_threads", "cpu_kernels")
    further = [o for o in bench.given if key_of(o) not in said]
    if runtime.cpu_kernels == "torch" and runtime.dtype is torch.bfloat16:
        further.append("cpu_kernels=torch")
    return ", ".join(text for text in (of, f"with {' '.join(sorted(further))}" if further else "") if text)


def experts_of(config: RunConfig) -> MoEConfig:
    """The experts that the model is made of. Raises UserError; a dense twin is written with those of its mixture."""
    if config.model.moe is None or config.model.dense_twin_of_moe is not None:
        raise UserError(f"model={config.model.name} has no experts: choose an MoE model")
    return config.model.moe


def made_up_tokens(config: RunConfig, batches: int) -> npt.NDArray[np.uint32]:
    """As many tokens as `batches` batches and one more token take."""
    ranks = np.arange(config.vocab_size)
    frequencies = 1 / (ranks + 2.7)
    count = batches * config.batch_size * config.data.sequence_length + 1
    drawn = np.random.default_rng(config.seed).choice(ranks, count, p=frequencies / frequencies.sum())
    return drawn.astype(np.uint32)


def described(config: RunConfig, runtime: Runtime) -> str:
    """What is trained, in a few words."""
    tokens = f"{config.batch_size} × {config.data.sequence_length} tokens"
    if config.micro_batch_size not in (None, config.batch_size):
        tokens += f" in micro-batches of {config.micro_batch_size}"
    dtype = {"bfloat16": "BF16", "float32": "FP32"}[str(runtime.dtype).removeprefix("torch.")]
    precision = dtype if config.precision.fp8 is None else config.precision.name
    return f"{config.model.name}, {tokens}, {precision}, {config.optimizer.kind}"
