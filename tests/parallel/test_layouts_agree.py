"""Every layout computes the same: losses, gradient norms, loads and weights are those of one process, to rounding.

In double precision rounding stays small for twenty steps. Muon iterates in single precision and makes noise of what a
gradient of few tokens has no direction for.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spread_cases import LAYOUTS, Results

pytestmark = pytest.mark.xdist_group("spread")


def assert_same(one: dict[str, Any], other: dict[str, Any], tolerance: float, of_weights: float) -> None:
    """Losses and norms to `tolerance` of each, weights afterwards to `of_weights` of the largest of a tensor.

    AdamW divides by gradients, of which some are next to nothing, so single weights are less alike than losses.
    """
    torch.testing.assert_close(torch.tensor(one["losses"]), torch.tensor(other["losses"]), rtol=tolerance, atol=0)
    norms = torch.tensor(one["norms"]), torch.tensor(other["norms"])
    torch.testing.assert_close(*norms, rtol=max(10 * tolerance, 1e-6), atol=0)
    assert_same_weights(one["weights"], other["weights"], of_weights)


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        difference = (other[name] - weight).abs().max().item()
        assert difference <= tolerance * (weight.abs().max().item() or 1.0), name


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "hybrid"])
def test_twenty_steps_are_those_of_one_process_with_accumulation_clipping_and_all_losses(
    spread_results: Results, layout: str
) -> None:
    one, other = spread_results["twenty/single"], spread_results[f"twenty/{layout}"]
    assert_same(one, other, 1e-9, 1e-6)
    assert torch.equal(one["counts"], other["counts"])
    assert one["losses"][-1][0] < one["losses"][0][0] - 0.2  # it learns
    assert min(one["norms"][:5]) > 0.5  # and is clipped


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_optimizers_that_multiply_by_the_coefficient_themselves_get_the_one_that_clipping_multiplies_by(
    spread_results: Results, layout: str
) -> None:
    one, other = spread_results[f"clipped/{layout}"], spread_results[f"left to AdamW/{layout}"]
    assert one["losses"] == other["losses"]
    assert one["norms"] == other["norms"]
    assert min(one["norms"]) > 0.2
    assert_same_weights(one["weights"], other["weights"], 0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_begins_with_the_same_numbers_and_one_that_cuts_has_no_whole_model(
    spread_results: Results, layout: str
) -> None:
    one, other = spread_results["muon/single"], spread_results[f"muon/{layout}"]
    assert one["begun"].keys() == other["begun"].keys()
    assert all(torch.equal(other["begun"][name], weight) for name, weight in one["begun"].items())
    assert other["whole_on_host"] == (layout == "ddp")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_muon_makes_whole_what_is_cut(spread_results: Results, layout: str) -> None:
    one, other = spread_results["muon/single"], spread_results[f"muon/{layout}"]
    for name, begun in one["begun"].items():
        step, difference = one["first"][name] - begun, other["first"][name] - one["first"][name]
        assert difference.norm() <= 0.05 * step.norm(), name  # misplaced rows would make it as large as the step
    torch.testing.assert_close(torch.tensor(one["losses"]), torch.tensor(other["losses"]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("layout", ["fsdp2", "hybrid", "ep_fsdp2"])
def test_matrices_that_are_cut_come_back_as_if_done_whole(spread_results: Results, layout: str) -> None:
    errors = spread_results[f"muon/{layout}"]["made_whole"]
    assert len(errors) == 4
    assert max(errors) < 1e-5


@pytest.mark.parametrize("layout", ["ddp", "ep"])
def test_what_all_have_one_does_for_all(spread_results: Results, layout: str) -> None:
    found = spread_results[f"muon/{layout}"]["done_once"]
    assert [counts for _, counts in found] == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [3, 3, 3, 0]]
    assert max(error for error, _ in found) < 1e-6


@pytest.mark.parametrize("layout", ["ep", "ep_fsdp2"])
def test_a_process_without_tokens_for_its_experts_waits_for_none(spread_results: Results, layout: str) -> None:
    one, other = spread_results["crowded/single"], spread_results[f"crowded/{layout}"]
    assert (one["counts"][0][:, 2:] == 0).all()
    assert_same(one, other, 1e-9, 1e-6)


@pytest.mark.parametrize("layout", ["fsdp2", "ep_fsdp2"])
def test_fp8_rounds_as_much_and_learns_the_same(spread_results: Results, layout: str) -> None:
    # Scales along tokens are of other tokens where these are shared out otherwise: it cannot be the same to rounding.
    one, other = (torch.tensor(spread_results[f"fp8/{name}"]["losses"])[:, 0] for name in ("single", layout))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=0)


@pytest.mark.parametrize("layout", ["fsdp2", "ep_fsdp2"])
def test_moments_in_bf16_are_rounded_at_random_and_right_on_average(spread_results: Results, layout: str) -> None:
    one, other = (torch.tensor(spread_results[f"moments/{name}"]["losses"])[:, 0] for name in ("single", layout))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=0)


@pytest.mark.parametrize("layout", ["fsdp2", "ep_fsdp2"])
def test_processes_beyond_the_number_of_experts_hold_none_and_take_part(spread_results: Results, layout: str) -> None:
    one, other = spread_results["few/single"], spread_results[f"few/{layout}"]
    torch.testing.assert_close(torch.tensor(one["losses"]), torch.tensor(other["losses"]), rtol=1e-3, atol=0)


def test_what_runs_in_bf16_is_the_same_in_all_layouts(spread_results: Results) -> None:
    ddp, other = spread_results["bf16/ddp"], spread_results["bf16/ep_fsdp2"]
    for key, tolerance in (("losses", 1e-3), ("norms", 3e-3)):
        torch.testing.assert_close(torch.tensor(ddp[key]), torch.tensor(other[key]), rtol=tolerance, atol=0)


@pytest.mark.parametrize("layout", ["ep", "ep_fsdp2"])
def test_places_of_experts_with_capacity_are_shared_out_as_without_expert_parallelism(
    spread_results: Results, layout: str
) -> None:
    assert_same(spread_results["switch/ddp"], spread_results[f"switch/{layout}"], 1e-9, 1e-6)


def test_what_a_process_holds_is_what_the_layout_says(spread_results: Results) -> None:
    experts, rest = "blocks.1.ffn.experts.down_proj", "blocks.0.ffn.gate_up_proj.weight"
    found = {layout: spread_results[f"muon/{layout}"]["held"] for layout in LAYOUTS}
    held = {layout: (rows[experts], rows[rest]) for layout, rows in found.items()}
    rows = 2 * 48
    assert held == {
        "ddp": (8, rows),
        "fsdp2": (2, rows // 4),
        "hybrid": (4, rows // 2),
        "ep": (4, rows),
        "ep_fsdp2": (2, rows // 4),
    }
