"""Which layout a configuration means on the processes there are, and the remedy where it means none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from moe_train.compose import compose_run
from moe_train.config import ModelConfig, ParallelConfig
from moe_train.errors import UserError
from moe_train.parallel.layouts import layout_of, note_on_experts

Make = Callable[..., ModelConfig]


def chosen(model: ModelConfig, started: int, on_a_machine: int = 8, **settings: Any) -> tuple[str, int, int]:
    layout = layout_of(ParallelConfig(**settings), model, started, on_a_machine)
    return layout.name, layout.shard, layout.expert_parallel


def test_auto_is_one_process_alone_or_whole_models_on_several(model_config: Make) -> None:
    nano = model_config("nano")
    assert chosen(nano, 1) == ("single", 1, 1)
    assert chosen(nano, 4) == ("ddp", 1, 1)


def test_what_is_not_given_is_all_processes_or_those_of_a_machine(model_config: Make) -> None:
    nano = model_config("nano", "moe.num_experts=16")
    assert chosen(nano, 16, layout="fsdp2") == ("fsdp2", 16, 1)
    assert chosen(nano, 16, layout="hybrid") == ("hybrid", 8, 1)
    assert chosen(nano, 16, layout="ep") == ("ep", 1, 16)
    assert chosen(nano, 16, layout="ep_fsdp2", expert_parallel=4) == ("ep_fsdp2", 16, 4)


@pytest.mark.parametrize(
    ("processes", "settings", "message"),
    [
        (2, {"layout": "single"}, "parallel=single is one process, and 2 were started: choose ddp"),
        (1, {"layout": "fsdp2"}, "parallel=fsdp2 is for several processes, and one was started: torchrun"),
        (2, {"layout": "ddp", "processes": 4}, "parallel.processes=4 were asked for and 2 started"),
        (6, {"layout": "hybrid", "shard": 4}, "parallel.shard=4 does not divide the 6 processes"),
        (6, {"layout": "ep", "expert_parallel": 4}, "parallel.expert_parallel=4 does not divide the 6 processes"),
        (
            3,
            {"layout": "ep"},
            "parallel.expert_parallel=3 does not divide model.moe.num_experts=16: choose one of 1, 2",
        ),
        (
            2,
            {"layout": "ep", "expert_parallel": 1, "dispatch_format": "fp8"},
            "parallel.dispatch_format=fp8 does nothing where every process has all experts",
        ),
    ],
)
def test_what_cannot_be_held_is_refused_with_the_remedy(
    model_config: Make, processes: int, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        chosen(model_config("nano", "moe.num_experts=16"), processes, **settings)


def test_a_dense_model_has_no_experts_to_share_out(model_config: Make) -> None:
    with pytest.raises(UserError, match="shares out experts and the model has none: choose fsdp2 or ddp"):
        chosen(model_config("nano", "moe=null"), 2, layout="ep")


def grouped(model_config: Make, n_group: int, topk_group: int) -> ModelConfig:
    model = model_config("nano", "moe.num_experts=24", "moe.top_k=2")
    assert model.moe is not None
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, n_group=n_group, topk_group=topk_group))


def test_groups_of_experts_lie_whole_on_processes_or_are_parts_of_one(model_config: Make) -> None:
    assert chosen(grouped(model_config, 6, 2), 12, layout="ep") == ("ep", 1, 12)
    assert chosen(grouped(model_config, 6, 2), 3, layout="ep") == ("ep", 1, 3)
    with pytest.raises(UserError, match=r"cuts across the model\.moe\.n_group=6 groups"):
        chosen(grouped(model_config, 6, 2), 8, layout="ep", expert_parallel=4)


def test_the_note_says_how_many_machines_a_token_can_reach(model_config: Make) -> None:
    def note(n_group: int, topk_group: int, on_a_machine: int) -> str | None:
        model = grouped(model_config, n_group, topk_group)
        return note_on_experts(layout_of(ParallelConfig(layout="ep"), model, 12, on_a_machine), model, on_a_machine)

    assert str(note(6, 2, 12)).endswith("a token stays on its machine")
    assert str(note(6, 2, 2)).endswith("a token reaches at most 2 of 6 machines")  # a group a machine
    assert str(note(3, 1, 2)).endswith("a token reaches at most 2 of 6 machines")  # a group is two machines
    assert str(note(6, 2, 4)).endswith("a token reaches at most 2 of 3 machines")
    assert str(note(1, 1, 2)).endswith("a token reaches at most 6 of 6 machines")


def test_a_setting_of_another_layout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel\.shard=2 does nothing with parallel\.layout=ddp: choose"):
        ParallelConfig(layout="ddp", shard=2)
    with pytest.raises(ValueError, match=r"expert_parallel=2 does nothing with parallel\.layout=fsdp2"):
        ParallelConfig(layout="fsdp2", expert_parallel=2)
    with pytest.raises(ValueError, match=r"dispatch_format=fp8 does nothing with parallel\.layout=ddp, where no token"):
        ParallelConfig(layout="ddp", dispatch_format="fp8")


def test_rounding_on_the_way_to_experts_makes_another_run() -> None:
    plain, rounded = (
        compose_run(["parallel=ep", f"parallel.dispatch_format={name}"], "train") for name in ("compute", "fp8")
    )
    assert plain.config_hash() == compose_run(["parallel=ddp"], "train").config_hash() != rounded.config_hash()
