"""What a launcher or a shell left in the environment is put right, or refused in a line that names it."""

from __future__ import annotations

import os

import pytest

from moe_train.errors import UserError
from moe_train.machine import cores_here
from moe_train.training.compute import set_threads
from moe_train.training.launched import processes_launched


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE=² is no whole number above 0"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is no whole number above 0"),
        ({"WORLD_SIZE": "2", "RANK": "¹", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=¹: it has to be this process"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "²"},
            "MASTER_PORT=²: it has to be a free",
        ),
        ({"ACCELERATE_USE_FSDP": "yes"}, "accelerate was set up for FSDP: choose parallel="),
        ({"ACCELERATE_USE_DEEPSPEED": "on"}, "accelerate was set up for DEEPSPEED"),
        ({"ACCELERATE_DYNAMO_BACKEND": "inductor"}, "ACCELERATE_DYNAMO_BACKEND=inductor: unset it"),
    ],
)
def test_what_cannot_be_is_named(environment: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        processes_launched(on_gpu=False)


def test_a_group_of_one_is_a_process_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "ACCELERATE_DYNAMO_BACKEND": "no"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "")  # given back afterwards
    assert processes_launched(on_gpu=False) == 1
    assert "WORLD_SIZE" not in os.environ
    assert os.environ["ACCELERATE_USE_CPU"] == "true"


def test_more_threads_than_cores_are_refused_by_the_name_they_were_asked_by(monkeypatch: pytest.MonkeyPatch) -> None:
    many = cores_here() + 1
    with pytest.raises(UserError, match=f"num_threads={many} is more than"):
        set_threads(many)
    monkeypatch.setenv("OMP_NUM_THREADS", str(many))
    with pytest.raises(UserError, match=f"OMP_NUM_THREADS={many} is more than .* or give num_threads="):
        set_threads(None)
    assert set_threads(1) == 1
