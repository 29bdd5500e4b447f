"""A run put together from parts: what is known of it by hand, and what must not change it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train.compose import CONFIGS
from moe_train.config import ModelConfig
from moe_train.cost.hardware import load_hardware
from moe_train.cost.utilization import flops_by_format, ideal_seconds
from moe_train.errors import UserError
from moe_train.forecast import rates
from moe_train.forecast.communication import Network, devices_visited, dispatch_bytes, nodes_visited
from moe_train.forecast.parts import BUBBLES, COMBINE, DISPATCH, LENT, REPLICAS, SHARDS, Machine, Task, step
from moe_train.forecast.parts_plot import plot_parts
from moe_train.forecast.pipeline import Chunk, alone_chunks, bubble_seconds
from moe_train.forecast.scaling import MEMORY_LIMIT, limits
from moe_train.forecast.work import ATTENTION, MEMORY

H800 = load_hardware(CONFIGS / "hardware/h800.yaml")
V3 = Machine(H800, 2048, 16, 64, "dualpipe", "zero1")
RESULT = Path(__file__).parents[2] / "docs/results/deepseek_v3_parts.json"


@pytest.fixture(scope="module")
def task(model_config: Callable[..., ModelConfig]) -> Task:
    model = model_config("deepseek_v3", "mtp=depth_1")
    return Task(model, 129280, 4096, batch_size=15360, micro_batch=1, fp8=True)


def test_bubbles_are_those_of_table_2() -> None:
    chunk = Chunk(forward=1.0, backward=2.0, weight=1.0, overlapped=3.0)
    assert bubble_seconds("1f1b", 8, chunk) == 7 * 3
    assert bubble_seconds("zb1p", 8, chunk) == 7 * 1
    assert bubble_seconds("dualpipe", 8, chunk) == 3 * 2
    assert bubble_seconds("1f1b", 1, chunk) == 0


@pytest.mark.parametrize(
    ("stages", "micro_batches", "overlapped", "played_out"),
    [(8, 20, 3.0, 66.0), (16, 120, 3.0, 374.0), (16, 120, 2.5, 319.0)],
)
def test_a_step_of_dualpipe_is_as_long_as_its_published_schedule_played_out(
    stages: int, micro_batches: int, overlapped: float, played_out: float
) -> None:
    """The lengths are those of `dualpipe.py`'s order of work with every send awaited."""
    chunk = Chunk(forward=1.0, backward=2.0, weight=1.0, overlapped=overlapped)
    alone = alone_chunks("dualpipe", stages)
    bubbles = bubble_seconds("dualpipe", stages, chunk)
    assert alone * 3 + (micro_batches - alone) * overlapped + bubbles == pytest.approx(played_out, rel=0.01)


def test_a_token_crosses_to_a_node_once_and_to_no_more_nodes_than_routing_allows(task: Task) -> None:
    moe = task.model.moe
    assert moe is not None
    assert H800.links is not None
    assert nodes_visited(moe, 8) == moe.topk_group == 4
    assert nodes_visited(dataclasses.replace(moe, n_group=1, topk_group=1), 8) == pytest.approx(8 * (1 - (7 / 8) ** 8))
    one_way = Network.of(H800.links).exchange(7168, moe, 64, dispatch_bytes(fp8=True))
    assert one_way.dispatch == pytest.approx(4 * (7168 + 7168 / 128 * 4) / 45e9)
    assert one_way.combine == pytest.approx(4 * 7168 * 2 / 45e9)


def test_a_token_visits_no_more_devices_than_routing_reaches(task: Task) -> None:
    moe = task.model.moe
    assert moe is not None
    assert devices_visited(moe, 64) == pytest.approx(32 * (1 - (31 / 32) ** 8))  # 4 nodes of 8
    to_devices = dataclasses.replace(moe, n_group=8, topk_group=3, top_k=6)  # DeepSeek-V2: groups are devices
    assert devices_visited(to_devices, 8) == pytest.approx(3 * (1 - (2 / 3) ** 6))
    assert devices_visited(moe, 1) == 1


def test_a_collective_runs_over_as_many_cards_as_it_has_devices_in_a_node() -> None:
    network = Network(devices_per_node=8, in_node=200.0, between_nodes=10.0)
    assert network.collective_speed(8) == 200
    assert network.collective_speed(16) == 8 * 10
    assert network.collective_speed(4, apart=8) == 10
    assert network.gather_seconds(160.0, 16) == pytest.approx(15 / 16 * 160 / 80)


def test_parts_take_longer_than_the_products_at_their_peaks_and_less_than_the_run_that_was_made(task: Task) -> None:
    taken = step(task, V3)
    flops = flops_by_format(task.model, 4096, 129280, "bfloat16", "float8")
    ideal = ideal_seconds(flops, H800.peak_tflops)
    assert ideal is not None
    assert ideal < taken.seconds * 2048 / taken.tokens < 180_000 * 3600 / 1e12
    assert taken.micro_batches == 120


def test_deepseek_v3_from_parts_is_what_the_results_say(task: Task) -> None:
    taken, kept = step(task, V3), json.loads(RESULT.read_text())
    assert taken.seconds == pytest.approx(kept["step_seconds"])
    assert kept["published_gpu_hours"] == pytest.approx(180_000)
    assert sum(kept["gpu_hours_by_part"].values()) == pytest.approx(kept["gpu_hours"])


def test_dualpipe_hides_what_other_schedules_show_but_for_the_chunks_at_its_ends(task: Task) -> None:
    hides, shows = step(task, V3), step(task, dataclasses.replace(V3, schedule="1f1b"))
    ends = 16 / 120
    for part in (DISPATCH, COMBINE):
        whole = hides.exposed[part] + hides.hidden[part]
        assert whole == pytest.approx(shows.exposed[part] + shows.hidden[part])
        assert hides.exposed[part] == pytest.approx(ends * whole)
        assert 0 < shows.hidden[part] < shows.exposed[part]  # behind the shared expert
    assert LENT in hides.exposed
    assert LENT not in shows.exposed
    assert hides.exposed[BUBBLES] < shows.exposed[BUBBLES]
    assert hides.state_bytes == pytest.approx(2 * shows.state_bytes)


def test_without_shared_experts_nothing_hides_the_all_to_all(task: Task) -> None:
    moe = task.model.moe
    assert moe is not None
    without = dataclasses.replace(task.model, moe=dataclasses.replace(moe, num_shared_experts=0))
    taken = step(dataclasses.replace(task, model=without), dataclasses.replace(V3, schedule="zb1p"))
    assert COMBINE in taken.exposed
    assert COMBINE not in taken.hidden


def test_queries_wider_than_values_have_the_kernel_that_mla_had(task: Task) -> None:
    assert task.kernel == "flash_attention_2"
    later = dataclasses.replace(task, attention_kernel="flash_attention_3")
    assert step(later, V3).exposed[ATTENTION] < step(task, V3).exposed[ATTENTION]


def test_weight_gradients_in_fp8_are_slower_than_other_products_and_hold_their_sums(task: Task) -> None:
    for products, gradients in (rates.FP8_PROJECTION_SHARES, rates.FP8_DENSE_SHARES, rates.FP8_EXPERT_SHARES):
        assert gradients < products
    whole, at_once = step(task, V3), step(dataclasses.replace(task, micro_batch=2), V3)
    heads = 2 * 129280 * 7168 * 8  # of the model and its MTP module: read and written in FP32
    router = 59 * 7168 * 256 * 8
    saved = (heads + router) / 16 * 60 / (3.35e12 * rates.MEMORY_SHARE)
    assert whole.exposed[MEMORY] - at_once.exposed[MEMORY] == pytest.approx(saved)


def test_a_slower_network_shows_what_was_hidden(task: Task) -> None:
    assert H800.links is not None
    slow = dataclasses.replace(H800, links=dataclasses.replace(H800.links, between_nodes_gb_s=5))
    taken = step(task, dataclasses.replace(V3, hardware=slow))
    assert taken.exposed[COMBINE] > 0
    assert taken.hidden[COMBINE] > 0


def test_replicas_are_summed_and_shards_gathered(task: Task) -> None:
    whole, shards = (step(task, dataclasses.replace(V3, sharding=name)) for name in ("ddp", "zero1"))
    assert REPLICAS in whole.exposed
    assert SHARDS not in whole.exposed
    assert SHARDS in shards.exposed
    assert REPLICAS not in shards.exposed
    assert shards.state_bytes < whole.state_bytes


def test_fewer_micro_batches_leave_longer_bubbles(task: Task) -> None:
    few = step(dataclasses.replace(task, batch_size=128 * 32), V3)
    many = step(task, V3)
    assert few.exposed[BUBBLES] / few.seconds > many.exposed[BUBBLES] / many.seconds


def test_what_does_not_fit_is_limited_by_memory(task: Task) -> None:
    by_devices = {each.num_devices: each for each in limits(task, H800)}
    assert by_devices[8].limit == MEMORY_LIMIT
    assert by_devices[8].needs_bytes > 671e9 / 8 * 6
    assert by_devices[4096].step is not None
    assert by_devices[4096].needs_bytes < 40e9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pipeline_parallel": 3}, "pipeline_parallel=3 does not divide num_gpus=2048"),
        ({"pipeline_parallel": 128}, "more than the 62 layers"),
        ({"expert_parallel": 48}, "expert_parallel=48 does not divide the 128 devices of a stage"),
        ({"num_devices": 2064}, "expert_parallel=64 does not divide the 129 devices"),
        ({"pipeline_parallel": 1, "expert_parallel": 1}, "no multiple of the 2048 sequences"),
        ({"hardware": dataclasses.replace(H800, links=None)}, "no link bandwidths: give links: in its file"),
    ],
    ids=str,
)
def test_a_layout_that_cannot_be_is_refused_with_the_remedy(change: dict[str, Any], message: str, task: Task) -> None:
    with pytest.raises(UserError, match=message):
        step(task, dataclasses.replace(V3, **change))


def test_dualpipe_needs_twice_as_many_micro_batches_as_stages(task: Task) -> None:
    with pytest.raises(UserError, match="32 or more, not 16"):
        step(dataclasses.replace(task, batch_size=128 * 16), V3)


def test_measured_shares_are_shares() -> None:
    for name in (n for n in dir(rates) if n.endswith(("_SHARE", "_SHARES")) and n != "ATTENTION_SHARES"):
        for share in np.atleast_1d(getattr(rates, name)):
            assert 0.2 < share <= 1, name
    for shares in rates.ATTENTION_SHARES.values():
        assert all(0.2 < share < 1 for share in shares)


def test_the_picture_of_the_parts_is_drawn_the_same_every_time(tmp_path: Path) -> None:
    content = json.loads(RESULT.read_text())
    for name in ("one.svg", "two.svg"):
        plot_parts(content, tmp_path / name)
    assert (tmp_path / "one.svg").read_text() == (tmp_path / "two.svg").read_text()
