"""Batches are a function of seed and step, and lose no token, whatever the sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_train.config import BatchRampConfig
from moe_train.data.batches import IGNORE_INDEX, Batches, validation_blocks
from moe_train.errors import UserError


def _tokens(count: int) -> np.ndarray:
    """Token i is i, so that a target says where in the text it is."""
    return np.arange(count, dtype=np.uint16)


sizes = st.tuples(st.integers(1, 9), st.integers(1, 6)).flatmap(
    lambda s: st.tuples(st.integers(s[0] + 1, 80), st.just(s[0]), st.just(s[1]))
)


@given(sizes, st.integers(0, 2**40))
def test_every_token_but_the_first_is_a_target_exactly_once_an_epoch(size: tuple[int, int, int], seed: int) -> None:
    count, length, batch_size = size
    batches = Batches(_tokens(count), length, batch_size, seed)
    rows = []
    for step in range(-(-2 * batches.num_blocks // batch_size)):
        inputs, targets = batches.batch(step)
        assert inputs.shape == targets.shape == (batch_size, length)
        real = targets != IGNORE_INDEX
        assert torch.equal(targets[real], inputs[real] + 1)
        assert (inputs[~real] == 0).all()
        rows += list(targets)
    for epoch in (rows[: batches.num_blocks], rows[batches.num_blocks : 2 * batches.num_blocks]):
        seen = torch.cat(epoch)
        assert sorted(seen[seen != IGNORE_INDEX].tolist()) == list(range(1, count))


@given(sizes, st.lists(st.integers(0, 50), min_size=1, max_size=6))
def test_a_batch_depends_on_seed_and_step_alone(size: tuple[int, int, int], steps: list[int]) -> None:
    count, length, batch_size = size
    walked = Batches(_tokens(count), length, batch_size, seed=1)
    for step in steps:
        fresh = Batches(_tokens(count), length, batch_size, seed=1)
        assert walked.indices(step).tolist() == fresh.indices(step).tolist()


def test_the_ranks_slices_joined_are_the_global_batch() -> None:
    batches = Batches(_tokens(100), sequence_length=5, batch_size=6, seed=3)
    whole = batches.batch(7)
    for world_size in (1, 2, 3, 6):
        shares = [batches.batch(7, rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat([inputs for inputs, _ in shares]), whole[0])
        assert torch.equal(torch.cat([targets for _, targets in shares]), whole[1])


def test_a_batch_that_ranks_cannot_share_evenly_is_an_error() -> None:
    with pytest.raises(UserError, match="6 sequences cannot be shared by 4"):
        Batches(_tokens(100), 5, 6, seed=0).batch(0, rank=0, world_size=4)


def test_a_ramp_grows_the_batch_in_multiples_of_its_start_over_its_tokens_and_skips_no_block() -> None:
    batches = Batches(_tokens(10_001), 10, 20, seed=0, ramp=BatchRampConfig(start=4, tokens=1_000))
    sizes = [len(batches.indices(step)) for step in range(20)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 4
    assert set(sizes) == {4, 8, 12, 16, 20}
    assert sum(size for size in sizes if size < 20) * 10 >= 1_000 - 20 * 10
    seen = np.concatenate([batches.indices(step) for step in range(20)])
    assert seen.tolist() == Batches(_tokens(10_001), 10, len(seen), seed=0).indices(0).tolist()
    assert [batches.num_targets(step) for step in range(20)] == [10 * size for size in sizes]


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = [Batches(_tokens(1001), 10, 100, seed).indices(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len(set(map(tuple, orders))) == 4


def test_the_order_is_the_same_on_every_machine_and_numpy() -> None:
    assert Batches(_tokens(11), 1, 10, seed=42).indices(0).tolist() == [4, 8, 1, 9, 3, 6, 0, 7, 2, 5]


def test_tokens_come_out_as_int64_from_a_file_of_uint16(tmp_path) -> None:  # type: ignore[no-untyped-def]
    np.full(9, 65535, np.uint16).tofile(tmp_path / "t.bin")
    inputs, targets = Batches(np.memmap(tmp_path / "t.bin", np.uint16, "r"), 8, 1, seed=0).batch(0)
    assert inputs.dtype == targets.dtype == torch.int64
    assert targets.tolist() == [[65535] * 8]


def test_a_text_shorter_than_a_block_is_an_error_that_names_the_key_and_the_tokens() -> None:
    with pytest.raises(UserError, match=r"data\.sequence_length=8.*8 tokens"):
        Batches(_tokens(8), sequence_length=8, batch_size=1, seed=0)


@given(
    count=st.integers(2, 60),
    length=st.integers(1, 9),
    batch_size=st.integers(1, 4),
    max_tokens=st.none() | st.integers(1, 70),
    world_size=st.integers(1, 4),
)
def test_validation_covers_its_first_targets_once_with_equal_shapes_on_all_ranks(
    count: int, length: int, batch_size: int, max_tokens: int | None, world_size: int
) -> None:
    ranks = [
        list(validation_blocks(_tokens(count), length, batch_size, max_tokens, rank, world_size))
        for rank in range(world_size)
    ]
    assert len({tuple(inputs.shape for inputs, _ in rank) for rank in ranks}) == 1
    inputs = torch.cat([inputs.flatten() for rank in ranks for inputs, _ in rank])
    targets = torch.cat([targets.flatten() for rank in ranks for _, targets in rank])
    real = targets != IGNORE_INDEX
    assert torch.equal(targets[real], inputs[real] + 1)
    expected = count - 1 if max_tokens is None else min(count - 1, max_tokens)
    assert sorted(targets[real].tolist()) == list(range(1, expected + 1))


def test_validation_is_in_the_order_of_the_text() -> None:
    targets = torch.cat([t for _, t in validation_blocks(_tokens(31), 5, batch_size=2, max_tokens=None)])
    assert targets.flatten().tolist() == list(range(1, 31))
