"""What is said to fit fits, and one more does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moe_train.config import AdamWConfig, ModelConfig
from moe_train.cost.fit import CONTEXT_BYTES, FitRow, fit, usable_bytes
from moe_train.cost.layout import SINGLE, Layout
from moe_train.cost.memory import peak_training_memory
from moe_train.errors import UserError

MakeConfig = Callable[..., ModelConfig]

ADAMW = AdamWConfig("adamw", 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0)
GB = 10**9


def rows(memory: int, *models: ModelConfig, length: int = 512, layout: Layout = SINGLE) -> list[FitRow]:
    return fit(
        memory,
        [(model.name, model, model.vocab_size or 4096) for model in models],
        sequence_length=length,
        optimizer=ADAMW,
        compute_bytes=2,
        layout=layout,
    )


def peak(model: ModelConfig, sequences: int, length: int, checkpointing: bool) -> int:
    return peak_training_memory(
        model,
        4096,
        sequences=sequences,
        sequence_length=length,
        optimizer=ADAMW,
        compute_bytes=2,
        activation_checkpointing=checkpointing,
        accumulates=True,
        device_type="cuda",
    ).bytes


@pytest.mark.parametrize("memory", [4 * GB, 24 * GB])
def test_one_more_sequence_does_not_fit(memory: int, model_config: MakeConfig) -> None:
    model = model_config("small", "mtp=depth_1")
    (row,) = rows(memory, model)
    room = usable_bytes(memory)
    assert row.largest_micro_batch_with_checkpointing > row.largest_micro_batch > 0
    for checkpointing, largest in (
        (False, row.largest_micro_batch),
        (True, row.largest_micro_batch_with_checkpointing),
    ):
        assert peak(model, largest, 512, checkpointing) <= room < peak(model, largest + 1, 512, checkpointing)
    longest = row.longest_sequence
    assert peak(model, 1, longest, True) <= room
    assert all(peak(model, 1, longest + 1, checkpointing) > room for checkpointing in (False, True))
    assert row.needs_activation_checkpointing is False
    assert row.peak_bytes == peak(model, 1, 512, False)


def test_a_model_may_need_its_activations_recomputed_or_fit_no_way(model_config: MakeConfig) -> None:
    model = model_config("small")
    kept, recomputed = (peak(model, 1, 65536, checkpointing) for checkpointing in (False, True))
    between = (kept + recomputed) // 2 + CONTEXT_BYTES
    (row,) = rows(round(between / 0.95), model, length=65536)
    assert (row.largest_micro_batch, row.needs_activation_checkpointing) == (0, True)
    assert row.peak_bytes == recomputed
    (row,) = rows(CONTEXT_BYTES, model)
    assert row.needs_activation_checkpointing is None
    assert (row.largest_micro_batch, row.largest_micro_batch_with_checkpointing, row.longest_sequence) == (0, 0, 0)


def test_more_memory_never_fits_less_and_more_devices_fit_larger_models(model_config: MakeConfig) -> None:
    models = [model_config("small"), model_config("base")]
    for less, more in zip(rows(16 * GB, *models), rows(80 * GB, *models), strict=True):
        assert less.largest_micro_batch <= more.largest_micro_batch
        assert less.longest_sequence <= more.longest_sequence
    large = model_config("qwen3_30b_a3b")
    assert rows(80 * GB, large)[0].needs_activation_checkpointing is None
    assert rows(80 * GB, large, layout=Layout.named("fsdp2", 64))[0].largest_micro_batch_with_checkpointing > 0


def test_a_layout_that_does_not_suit_a_model_is_refused(model_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="does not divide"):
        rows(80 * GB, model_config("base"), layout=Layout.named("ep", 36))
