"""Every layout computes the same: losses, gradient norms, loads and weights are those of one process, to rounding.

In double precision rounding stays small for fifty steps; Muon iterates in single precision, so it is given three.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spread_cases import LAYOUTS, Results, case, run

LOSSES = [
    "model/mtp=depth_1",
    "model.moe.sequence_loss_weight=0.01",
    "model.moe.router_z_loss_weight=0.001",
    "z_loss_weight=1e-4",
    "optimizer.max_grad_norm=0.5",
]
# A step has two micro-batches on two processes, one on four.
FIFTY = ("fifty", [*LOSSES, "optimizer=adamw", "optimizer.lr=1e-2", "batch_size=4"], {"steps": 50, "double": True})
MUON = ("muon", [*LOSSES, "optimizer=muon", "optimizer.lr=1e-2"], {"double": True})
CROWDED = ("crowded", ["optimizer=adamw", "activation_checkpointing=true"], {"double": True, "crowded": True})
FP8 = ("fp8", ["optimizer=adamw", "optimizer.lr=1e-3", "precision=fp8_deepseek", "precision.backend=emulated"], {})
BF16_MOMENTS = ("moments", ["optimizer=muon", "optimizer.moments=bfloat16", "optimizer.stochastic_rounding=true"], {})


def cases(layouts: tuple[str, ...], *kinds: tuple[str, list[str], dict[str, Any]]) -> list[dict[str, Any]]:
    return [case(name, layout, *overrides, **more) for name, overrides, more in kinds for layout in layouts]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All cases on four processes, and on one."""
    folder = tmp_path_factory.mktemp("spread")
    spread = tuple(LAYOUTS)
    capacity = ("switch", ["model/moe=switch", "model.moe.top_k=1", "optimizer=adamw"], {"double": True})
    wanted = cases(("ep_fsdp2",), FIFTY) + cases(spread, MUON)
    wanted += cases(("ep", "ep_fsdp2"), CROWDED) + cases(("fsdp2", "ep_fsdp2"), FP8, BF16_MOMENTS)
    wanted += cases(("ddp", "ep", "ep_fsdp2"), capacity)
    found = run(folder, wanted, processes=4) | run(folder, cases(("ddp", "fsdp2", "ep"), FIFTY), processes=2)
    alone = cases(("single",), FIFTY, MUON, CROWDED, FP8, BF16_MOMENTS)
    return found | run(folder, [c | {"overrides": [*c["overrides"], "micro_batch_size=4"]} for c in alone], processes=1)


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
def test_fifty_steps_are_those_of_one_process_with_accumulation_clipping_and_all_losses(
    four: Results, layout: str
) -> None:
    one, other = four["fifty/single"], four[f"fifty/{layout}"]
    assert_same(one, other, 1e-9, 1e-6)
    assert torch.equal(one["counts"], other["counts"])
    assert one["losses"][-1][0] < one["losses"][0][0] - 0.2  # it learns
    assert min(one["norms"][:5]) > 0.5  # and is clipped


@pytest.mark.parametrize("layout", LAYOUTS)
def test_muon_makes_whole_what_is_cut(four: Results, layout: str) -> None:
    one, other = four["muon/single"], four[f"muon/{layout}"]
    assert_same_weights(one["first"], other["first"], 1e-5)
    assert_same(one, other, 1e-4, 1e-3)


@pytest.mark.parametrize("layout", ["ep", "ep_fsdp2"])
def test_a_process_without_tokens_for_its_experts_waits_for_none(four: Results, layout: str) -> None:
    one, other = four["crowded/single"], four[f"crowded/{layout}"]
    assert (one["counts"][0][:, 2:] == 0).all()
    assert_same(one, other, 1e-9, 1e-6)


@pytest.mark.parametrize("layout", ["fsdp2", "ep_fsdp2"])
def test_fp8_rounds_as_much_and_learns_the_same(four: Results, layout: str) -> None:
    # Scales along tokens are of other tokens where these are shared out otherwise: it cannot be the same to rounding.
    one, other = (torch.tensor(four[f"fp8/{name}"]["losses"])[:, 0] for name in ("single", layout))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=0)


@pytest.mark.parametrize("layout", ["fsdp2", "ep_fsdp2"])
def test_moments_in_bf16_are_rounded_at_random_and_right_on_average(four: Results, layout: str) -> None:
    one, other = (torch.tensor(four[f"moments/{name}"]["losses"])[:, 0] for name in ("single", layout))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=0)


@pytest.mark.parametrize("layout", ["ep", "ep_fsdp2"])
def test_places_of_experts_with_capacity_are_shared_out_as_without_expert_parallelism(
    four: Results, layout: str
) -> None:
    assert_same(four["switch/ddp"], four[f"switch/{layout}"], 1e-9, 1e-6)


def test_what_a_process_holds_is_what_the_layout_says(four: Results) -> None:
    experts, rest = "blocks.1.ffn.experts.down_proj", "blocks.0.ffn.gate_up_proj.weight"
    found = {layout: four[f"muon/{layout}"]["held"] for layout in LAYOUTS}
    held = {layout: (rows[experts], rows[rest]) for layout, rows in found.items()}
    rows = 2 * 48
    assert held == {
        "ddp": (8, rows),
        "fsdp2": (2, rows // 4),
        "hybrid": (4, rows // 2),
        "ep": (4, rows),
        "ep_fsdp2": (2, rows // 4),
    }
