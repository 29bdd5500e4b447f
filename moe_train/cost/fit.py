"""Whether models fit a device: the largest micro-batch, the longest sequence, whether activations must be recomputed.

The peak of a step (`memory.peak_training_memory`) grows with sequences and with their length, so the largest that fits
is found by doubling and bisection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from moe_train.config import ModelConfig, OptimizerConfig
from moe_train.cost.fp8_operands import Fp8Kept
from moe_train.cost.kernels import Kernels
from moe_train.cost.layout import SINGLE, Layout
from moe_train.cost.memory import peak_training_memory

# What CUDA's context with the kernels of torch, cuBLAS and their workspaces takes before the first tensor: around
# 0.6 GB on data-centre GPUs. Not measured here.
CONTEXT_BYTES = 600_000_000
# Share of the memory that torch's caching allocator holds in blocks too small or too split to be used. An assumption:
# a few per cent are usual where shapes repeat.
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class FitRow:
    """What of one model fits a device; 0 where nothing does."""

    model: str
    sequence_length: int
    largest_micro_batch: int  # sequences at once, all activations kept
    largest_micro_batch_with_checkpointing: int
    longest_sequence: int  # tokens of one sequence alone, with activation checkpointing where that makes it longer
    needs_activation_checkpointing: bool | None  # for one sequence; None: it does not fit either way
    peak_bytes: int  # of one sequence, in the way it needs; with checkpointing where it does not fit


def usable_bytes(memory: int) -> int:
    """What tensors can take of a device's `memory` in bytes."""
    return max(0, int(memory * (1 - FRAGMENTATION)) - CONTEXT_BYTES)


def fit(
    memory: int,
    models: Sequence[tuple[str, ModelConfig, int]],
    *,
    sequence_length: int,
    optimizer: OptimizerConfig,
    compute_bytes: int,
    fp8: Fp8Kept | None = None,
    layout: Layout = SINGLE,
    accumulates: bool = True,
    kernels: Kernels = Kernels.TRITON,
) -> list[FitRow]:
    """A row for each (name, model, vocabulary) on devices of `memory` bytes each, laid out as `layout`.

    `accumulates`: gradients of earlier micro-batches exist, as when a batch is cut to fit. `compute_bytes`: 2 where
    matrix products run in BF16, 4 in FP32; `fp8`: those of linear layers are in FP8, and what is kept so. `kernels`:
    torch's operations on GPUs that Triton's kernels are not for, of compute capability below 8.0.
    Raises UserError where a model cannot be laid out so.
    """
    room = usable_bytes(memory)
    rows = []
    for name, model, vocab_size in models:
        peak = partial(
            _peak_bytes,
            model.resolved(),
            vocab_size,
            optimizer=optimizer,
            compute_bytes=compute_bytes,
            fp8=fp8,
            accumulates=accumulates,
            layout=layout,
            kernels=kernels,
        )
        rows.append(_row(name, peak, sequence_length, room))
    return rows


def _row(name: str, peak: Callable[[bool, int, int], int], length: int, room: int) -> FitRow:
    kept = _most(lambda sequences: peak(False, sequences, length), room)
    checkpointed = _most(lambda sequences: peak(True, sequences, length), room)
    longest = max(_most(lambda tokens, way=way: peak(way, 1, tokens), room) for way in (False, True))  # type: ignore[misc]
    needs = None if not max(kept, checkpointed) else kept == 0
    return FitRow(name, length, kept, checkpointed, longest, needs, peak(needs is not False, 1, length))


def _peak_bytes(
    model: ModelConfig,
    vocab_size: int,
    activation_checkpointing: bool,
    sequences: int,
    length: int,
    *,
    optimizer: OptimizerConfig,
    compute_bytes: int,
    fp8: Fp8Kept | None,
    accumulates: bool,
    layout: Layout,
    kernels: Kernels,
) -> int:
    return peak_training_memory(
        model,
        vocab_size,
        sequences=sequences,
        sequence_length=length,
        optimizer=optimizer,
        compute_bytes=compute_bytes,
        fp8=fp8,
        activation_checkpointing=activation_checkpointing,
        accumulates=accumulates,
        layout=layout,
        device_type="cuda",
        kernels=kernels,
    ).bytes


def _most(peak: Callable[[int], int], room: int) -> int:
    """The largest number whose peak is no more than `room`; 0 if that of one is more."""
    if peak(1) > room:
        return 0
    fits, not_fits = 1, 2
    while peak(not_fits) <= room:
        fits, not_fits = not_fits, 2 * not_fits
    while not_fits - fits > 1:
        middle = (fits + not_fits) // 2
        if peak(middle) <= room:
            fits = middle
        else:
            not_fits = middle
    return fits
