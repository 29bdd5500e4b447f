"""The map of tensor names: complete, one to one, and the same in both directions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_train.interop.families import FAMILIES
from moe_train.interop.family import Family
from moe_train.interop.names import Place, _in_pairs, places
from moe_train.model.transformer import Transformer


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_number_of_a_model_has_one_place_and_comes_back_from_it(
    family: Family, small_model: Callable[..., Transformer]
) -> None:
    attention = () if family.attention == "mla" else ("attention=gqa_4x32", "attention.head_dim=8")
    model = small_model(*attention, "tie_word_embeddings=false")
    where = places(model.config, family.names)
    state = model.state_dict()
    assert where.keys() == state.keys()
    everywhere = [place.theirs for parts in where.values() for place in parts]
    assert len(everywhere) == len(set(everywhere))
    for name, ours in state.items():
        if name.endswith("selection_bias") and not family.names.selection_bias:
            assert where[name] == []
            continue
        again = torch.full_like(ours, torch.nan)
        for place in where[name]:
            place.fill(again, place.cut(ours).clone())
        assert torch.equal(again, ours), name


@given(heads=st.integers(1, 4), kept=st.integers(0, 5), pairs=st.integers(1, 5))
def test_rotary_rows_go_from_halves_to_pairs_and_the_others_stay(heads: int, kept: int, pairs: int) -> None:
    order = _in_pairs(heads, kept=kept, turned=2 * pairs).view(heads, kept + 2 * pairs)
    for head in range(heads):
        start = head * (kept + 2 * pairs)
        rows = order[head] - start
        assert rows[:kept].tolist() == list(range(kept))
        assert (rows[kept:].view(pairs, 2) - kept).tolist() == [[i, i + pairs] for i in range(pairs)]


def test_a_place_of_another_dtype_is_filled_by_value() -> None:
    ours = torch.zeros(4, 2)
    Place("x", (slice(1, 3),), torch.tensor([1, 0])).fill(ours, torch.tensor([[1, 2], [3, 4]], dtype=torch.bfloat16))
    assert ours.tolist() == [[0, 0], [3, 4], [1, 2], [0, 0]]
