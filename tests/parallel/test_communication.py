"""What processes exchange is counted, all of it, and counting it changes nothing."""

from __future__ import annotations

import time
from collections import Counter
from unittest import mock

import pytest
import torch
from spread_cases import Results

from moe_train.cost.communication import Exchanged
from moe_train.parallel import clocks
from moe_train.parallel.clocks import HostClock
from moe_train.training.muon import fast_dtype

pytestmark = pytest.mark.xdist_group("spread")


@pytest.mark.parametrize("processes", [2, 4])
def test_bytes_are_those_of_a_calculation_by_hand(spread_results: Results, processes: int) -> None:
    sent = dict(spread_results[f"collectives/{processes}"])
    others, whole = processes - 1, 40 * processes  # bytes of ten numbers a process
    pickled = sent.pop("object")
    assert sent == {
        "all_gather": others * 40,
        "reduce_scatter": others * 40,
        "all_reduce": others * 80,
        "broadcast": whole * others / processes,
        "all_to_all, equal": others * 40,
        "all_to_all, uneven": others * 3 * 4,
        "barrier": 0,
        "outside": others * 80,
    }
    assert 1000 * others / processes < pickled < 1300 * others / processes


def sent(results: Results, case: str, step: int = 0) -> dict[str, float]:
    exchanged: Exchanged = results[case]["exchanged"][step]
    return {kind: count for kind, count in exchanged.sent.items() if count}


def parameters(results: Results) -> dict[str, torch.Tensor]:
    begun = results["muon/single"]["begun"]
    return {name: tensor for name, tensor in begun.items() if not name.endswith("selection_bias")}


def numbers(results: Results, of_experts: bool) -> int:
    """How many weights are the routed experts', or all others."""
    named = parameters(results).items()
    return sum(tensor.numel() for name, tensor in named if (".experts." in name) == of_experts)


def test_ddp_sends_a_gradient_twice_round_the_ring(spread_results: Results) -> None:
    weights = numbers(spread_results, True) + numbers(spread_results, False)  # after the last of two micro-batches
    assert sent(spread_results, "muon/ddp")["gradients"] == 2 * 3 / 4 * 4 * weights


def test_ddp_sends_what_a_process_made_of_its_share_of_muons_matrices(spread_results: Results) -> None:
    alike: Counter[tuple[int, int]] = Counter()  # matrices of each shape
    for name, weight in parameters(spread_results).items():
        if weight.ndim > 1 and not name.startswith(("embedding", "lm_head")) and not name.endswith("router.weight"):
            halves = 2 if "gate_up_proj" in name else 1  # gate and up are two
            alike[weight.shape[-2] // halves, weight.shape[-1]] += halves * (len(weight) if weight.ndim == 3 else 1)
    padded = sum(4 * -(-count // 4) * rows * columns for (rows, columns), count in alike.items())
    number = fast_dtype(torch.device("cpu")).itemsize
    assert sent(spread_results, "muon/ddp")["whole_matrices"] == 3 / 4 * number * padded


def test_experts_are_summed_over_those_that_hold_them(spread_results: Results) -> None:
    # Two parts of experts on four processes: each half is summed over two, all else over four.
    experts, rest = numbers(spread_results, True), numbers(spread_results, False)
    assert sent(spread_results, "muon/ep")["gradients"] == 2 * 1 / 2 * 4 * experts / 2 + 2 * 3 / 4 * 4 * rest
    assert "weights" not in sent(spread_results, "muon/ep")


def test_what_is_cut_is_gathered_and_scattered_by_rows_of_equal_number(spread_results: Results) -> None:
    found = sent(spread_results, "muon/fsdp2")
    padded = sum(4 * -(-len(each) // 4) * each[0].numel() for each in parameters(spread_results).values())
    assert found["gradients"] == 2 * 3 / 4 * 4 * padded  # after each of two micro-batches
    # Blocks forwards and backwards; the outermost module's weights stay gathered in between.
    assert 2 * 3 / 4 * 4 * padded < found["weights"] < 4 * 3 / 4 * 4 * padded
    assert set(found) == {"weights", "gradients", "whole_matrices", "other"}


def test_rows_that_stay_are_not_sent(spread_results: Results) -> None:
    # Sixteen tokens a process go to two experts each, all of which the even processes hold: the odd ones send theirs.
    width, gate, rows, layers = 32 * 8, 8, 16 * 2, 1
    found = sent(spread_results, "rounded crowded/ep")
    packed = 32 + 4  # a row in FP8 with its scale
    assert found["dispatch"] == layers * rows * (packed + gate + packed) / 2
    assert found["combine"] == layers * rows * (width + gate + width) / 2


def test_dispatch_in_fp8_is_half_of_that_in_bf16_and_its_scales(spread_results: Results) -> None:
    row, gate = 2 * 32, 4
    packed = 32 + 4  # with the scale of the one tile that a row of 32 has
    wide = sent(spread_results, "bf16/ep_fsdp2")
    assert wide["dispatch"] == wide["combine"]
    found = sent(spread_results, "rounded bf16/ep_fsdp2")
    rows = found["combine"] / (row + gate + row)
    assert rows > 0
    assert found["dispatch"] == rows * (packed + gate + packed)


@pytest.mark.parametrize("layout", ["ddp", "ep_fsdp2"])
def test_counting_changes_nothing(spread_results: Results, layout: str) -> None:
    counted, uncounted = spread_results[f"muon/{layout}"], spread_results[f"uncounted/{layout}"]
    assert counted["losses"] == uncounted["losses"]
    assert all(torch.equal(counted["weights"][name], weight) for name, weight in uncounted["weights"].items())
    assert not sent(spread_results, f"uncounted/{layout}")


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "ep_fsdp2"])
def test_every_other_step_was_timed(spread_results: Results, layout: str) -> None:
    first, second, third = spread_results[f"muon/{layout}"]["exchanged"]
    for timed in (first, third):
        assert 0 < timed.waited_seconds < timed.timed_seconds
        assert all((timed.exposed[kind] + timed.hidden[kind] > 0) == (count > 0) for kind, count in timed.sent.items())
    assert second.exposed_fraction is None
    assert second.sent["gradients"] == first.sent["gradients"]


def test_weights_that_are_read_in_bf16_are_gathered_in_it_and_nothing_changes(spread_results: Results) -> None:
    narrow, wide = spread_results["bf16/ep_fsdp2"], spread_results["bf16 wide/ep_fsdp2"]
    assert narrow["losses"] == wide["losses"]
    assert all(torch.equal(wide["weights"][name], weight) for name, weight in narrow["weights"].items())
    weights = [sent(spread_results, f"{case}/ep_fsdp2")["weights"] for case in ("bf16", "bf16 wide", "muon")]
    assert weights[1] == weights[2]
    assert 0.5 < weights[0] / weights[1] < 0.6  # norms, routers and the embedding are read in FP32


@pytest.mark.parametrize("layout", ["ep", "ep_fsdp2"])
def test_tokens_travel_while_shared_experts_are_computed_and_so_do_their_gradients(
    spread_results: Results, layout: str
) -> None:
    assert spread_results[f"watched/{layout}"]["events"] == [
        "dispatch of rows begun",
        "dispatch of gates begun",
        "shared experts",
        "dispatch of rows waited for",
        "dispatch of gates waited for",
        "combine of rows begun",
        "combine of rows waited for",
        # backwards
        "dispatch of rows begun",
        "dispatch of rows waited for",
        "combine of gates begun",
        "combine of rows begun",
        "gradients of shared experts",
        "combine of gates waited for",
        "combine of rows waited for",
    ]


def test_of_an_exchange_what_is_stood_still_for_is_exposed_and_the_rest_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock, work, done = HostClock(), mock.Mock(), torch.futures.Future()
    work.get_future.return_value = done
    monkeypatch.setattr(clocks, "work_of", lambda result: result)
    clock.begin()
    now = 1.0
    clock.called("dispatch", lambda: work, asynchronous=True, waited_for=True)
    now = 4.0
    with clock.standing_still():
        now = 6.0
        done.set_result(None)
    now = 7.0
    clock.waited()  # the end of a backward pass: this exchange was waited for long ago
    clock.end()
    exchanged, reading = Exchanged.nothing(), clock.read()
    exchanged.add_times(reading.by_kind, reading.stalls, reading.seconds)
    assert (exchanged.hidden["dispatch"], exchanged.exposed["dispatch"]) == (3.0, 2.0)
    assert (exchanged.waited_seconds, exchanged.timed_seconds) == (2.0, 7.0)
