"""A checkpoint of any layout and number of processes is read by any other, and goes on bit for bit in its own."""

from __future__ import annotations

import pytest
import torch
from spread_cases import WORLDS, Results

pytestmark = pytest.mark.xdist_group("spread")

WRITERS = [f"{layout}{processes}" for processes, layouts in WORLDS.items() for layout in layouts]
FILES = ["model.safetensors", "optimizers.pt", "state.json"]


def readers_of(results: Results, writer: str) -> list[str]:
    return [name.split(" to ")[1] for name in results if name.startswith(f"{writer} to ")]


@pytest.mark.parametrize("writer", WRITERS)
def test_what_one_layout_wrote_all_others_read(spread_results: Results, writer: str) -> None:
    saved, readers = spread_results[writer]["saved"], readers_of(spread_results, writer)
    assert {writer, "ep_fsdp24", "single1"} <= set(readers)
    assert sum(name.startswith("optimizer.") for name in saved) > 30
    for reader in readers:
        loaded = spread_results[f"{writer} to {reader}"]["loaded"]
        assert saved.keys() == loaded.keys()
        for name, tensor in saved.items():
            assert torch.equal(tensor, loaded[name]), (reader, name)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_run_goes_on_bit_for_bit_in_its_own_layout_and_to_rounding_in_others(
    spread_results: Results, writer: str
) -> None:
    for reader in readers_of(spread_results, writer):
        straight, resumed = spread_results[writer], spread_results[f"{writer} to {reader}"]
        if reader == writer:
            assert resumed["losses"] == straight["losses"][2:]
            assert all(torch.equal(straight["weights"][name], w) for name, w in resumed["weights"].items())
        losses = torch.tensor(resumed["losses"]), torch.tensor(straight["losses"][2:])
        torch.testing.assert_close(*losses, rtol=1e-3, atol=0)


@pytest.mark.parametrize("writer", WRITERS)
def test_layouts_that_cut_leave_shards_and_others_files(spread_results: Results, writer: str) -> None:
    whole = writer in ("single1", "ddp2")
    assert spread_results[writer]["files"] == (FILES if whole else ["shards", "state.json"])
