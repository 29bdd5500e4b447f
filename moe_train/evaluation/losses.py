"""The loss of a finished run's model on a text, with the precision and the settings of the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from moe_train.config import ParallelConfig
from moe_train.errors import UsageError, UserError
from moe_train.evaluation import texts
from moe_train.generation.loading import TrainedModel, load_trained, threads_of
from moe_train.kernels.cpu.library import Choice
from moe_train.precision import recipes
from moe_train.training.evaluation import evaluate
from moe_train.training.fp8_health import modules_in_compute_format
from moe_train.training.runtime import Runtime, start_runtime

_TOKENS_AT_ONCE = 4096


def evaluate_run(
    run: Path,
    *,
    split: Literal["val", "train"] = "val",
    files: str | None = None,
    text_field: str | None = None,
    max_tokens: int | Literal["all"] | None = None,
    sequence_length: int | None = None,
    in_fp8: bool | None = None,
    cpu_kernels: Choice | None = None,
    num_threads: int | None = None,
) -> dict[str, Any]:
    """Loss (nats a token), bits per byte and what they were measured on, ready for JSON. Raises UserError.

    files: a glob; in place of the run's own `split`. max_tokens and sequence_length: the run's own if not given, and
    for files all of their text. in_fp8: linear layers as the run's recipe has them, by a backend that this machine has,
    which need not be the run's; None: as the run evaluates. cpu_kernels, num_threads: the run's own if not given,
    and all cores where that had more of them.
    """
    trained = load_trained(run)
    config = trained.config
    length = sequence_length or config.data.sequence_length
    if length <= config.model.mtp_depth:
        raise UsageError(
            f"sequence_length={length}: the model's MTP modules look {config.model.mtp_depth} tokens further: raise it"
        )
    limit = config.eval.max_tokens if max_tokens is None and files is None else max_tokens
    limit = None if limit == "all" else limit
    runtime = _runtime(trained, cpu_kernels or config.cpu_kernels, num_threads or threads_of(config))
    trained.model.to(runtime.device)
    fp8, not_in_fp8 = None, list[str]()
    if config.precision.evaluate_in_fp8 if in_fp8 is None else in_fp8:
        fp8, not_in_fp8 = _multiply_in_fp8(trained, runtime)
    with TemporaryDirectory() as folder:
        if files is None:
            text = texts.own_split(trained, split, limit)
        else:
            field = text_field or str(getattr(config.data, "text_field", "text"))
            text = texts.files(trained, files, field, Path(folder), limit)
        measured = evaluate(
            trained.model,
            text,
            runtime,
            sequence_length=length,
            batch_size=_batch_size(trained, length),
            max_tokens=limit,
        )
        if measured is None:
            raise UserError(f"{files or split} holds no token to predict: give a text of two tokens or more")
        return {
            "run": str(trained.folder),
            "checkpoint": str(trained.checkpoint.path),
            "step": trained.checkpoint.step,
            "text": files or f"{config.data.name}, {split} split",
            "text_fingerprint": text.fingerprint,
            "loss": measured.loss,
            "bits_per_byte": measured.bits_per_byte,
            "tokens": measured.tokens,
            "bytes": text.val_bytes(measured.tokens),
            "mtp_losses": list(measured.mtp_losses),
            "sequence_length": length,
            "compute_dtype": str(runtime.dtype).removeprefix("torch."),
            "fp8": fp8,
            "fp8_modules_in_compute_format": not_in_fp8,
            "trained_in_fp8": config.precision.name if config.precision.fp8 else None,
            "device_name": runtime.device_name,
            "num_threads": runtime.num_threads,
            "cpu_kernels": runtime.cpu_kernels,
            "notes": list(runtime.notes),
        }


def _multiply_in_fp8(trained: TrainedModel, runtime: Runtime) -> tuple[str, list[str]]:
    """Returns the recipe and what multiplies, and the modules that the run gave back to the compute format."""
    precision = trained.config.precision
    if precision.fp8 is None:
        raise UserError(f"in_fp8=true: {trained.folder} has no recipe of FP8, its precision is {precision.name}")
    here = dataclasses.replace(precision, backend="auto", evaluate_in_fp8=True)
    products = recipes.apply(trained.model, here, runtime.device)
    assert products is not None
    given_back = modules_in_compute_format(trained.checkpoint.state, precision)
    recipes.to_compute_format(trained.model, given_back)
    return f"{precision.name}, {products.backend.name}", given_back


def _runtime(trained: TrainedModel, cpu_kernels: Choice, num_threads: int | None) -> Runtime:
    """The run's precision on this machine, in one process."""
    one_process = dataclasses.replace(
        trained.config,
        cpu_kernels=cpu_kernels,
        cuda_graphs="never",  # of steps, and there are none: a CPU refuses those that a run insisted on
        num_threads=num_threads,
        batch_size=1,
        micro_batch_size=None,
        batch_ramp=None,
        parallel=ParallelConfig(),
    )
    return start_runtime(one_process)


def _batch_size(trained: TrainedModel, sequence_length: int) -> int:
    """Sequences taken at once: as many tokens as a micro-batch of the run had, or more where these were few."""
    config = trained.config
    tokens = (config.micro_batch_size or config.batch_size) * config.data.sequence_length
    moe = config.model.moe
    if moe is None or moe.routing != "expert_choice":  # there a token's loss depends on the batch it is in
        tokens = max(tokens, _TOKENS_AT_ONCE)
    return max(1, tokens // sequence_length)
