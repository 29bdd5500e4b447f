"""How many jobs run at a time, and what each may use."""

from __future__ import annotations

import pytest

from moe_train.errors import UserError
from moe_train.sweeps import devices
from moe_train.sweeps.devices import Devices, jobs_at_a_time, threads_of_a_job


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cores_here", lambda: 8)


@pytest.mark.parametrize(
    ("gpus", "asked", "num_threads", "processes", "expected"),
    [
        (0, None, None, 1, 1),  # a job takes all cores
        (0, None, 2, 1, 4),
        (0, None, 2, 2, 2),
        (0, None, 16, 1, 1),
        (0, 3, None, 1, 3),
        (4, None, None, 1, 4),
        (5, None, None, 2, 2),
        (4, 8, None, 1, 8),
    ],
)
def test_jobs_at_a_time(gpus: int, asked: int | None, num_threads: int | None, processes: int, expected: int) -> None:
    assert jobs_at_a_time(Devices.gpus(gpus), asked, num_threads, processes) == expected


def test_jobs_that_share_a_cpu_share_its_cores() -> None:
    assert threads_of_a_job(Devices(), 4, None) == ["num_threads=2"]
    assert threads_of_a_job(Devices(), 2, None, processes=2) == ["num_threads=2"]
    assert threads_of_a_job(Devices(), 1, None) == []
    assert threads_of_a_job(Devices(), 4, 1) == []
    assert threads_of_a_job(Devices.gpus(2), 2, None) == []


def test_a_job_of_more_gpus_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match="a job of 4 processes needs 4 GPUs, and 2 are there"):
        Devices.gpus(2).groups(4)
