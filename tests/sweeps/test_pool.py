"""Jobs as real processes: ended when the budget or the sweep is, waited for when they outlived one, made once."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sleeping_jobs import Ended, Instantly, Sleepers, pool, sleeping, write_summary

from moe_train.cost.attempt import FINISHED, RUNNING, Attempt, as_line
from moe_train.cost.budget import Budget
from moe_train.processes import began
from moe_train.sweeps.devices import Devices
from moe_train.sweeps.job import Job, Outcome, once
from moe_train.sweeps.pool import Interrupted
from moe_train.training.keepers import HELD_BY, is_alive

Make = Callable[[int], Job]


def after(seconds: float, action: Callable[[], object]) -> None:
    threading.Timer(seconds, action).start()


def statuses(outcomes: list[Outcome]) -> list[str]:
    return [outcome.status for outcome in outcomes]


def test_a_failed_job_does_not_end_the_rest_and_its_last_words_are_kept(tmp_path: Path, job: Make) -> None:
    start = Instantly({"seed=1": 3})
    made = pool(tmp_path, start=start).make([job(seed) for seed in range(3)])
    assert start.started == ["seed=0", "seed=1", "seed=2"]
    assert statuses(made.outcomes) == ["finished", "failed", "finished"]
    assert (made.outcomes[1].exit_status, made.outcomes[1].says) == (3, "it went wrong")
    assert made.stopped is None


def test_what_is_finished_is_not_made_again(tmp_path: Path, job: Make) -> None:
    pool(tmp_path, start=Instantly()).make([job(0)])
    start = Instantly()
    made = pool(tmp_path, start=start).make(once([job(0), job(1), job(0)]))
    assert start.started == ["seed=1"]
    assert statuses(made.outcomes) == ["there already", "finished"]


def test_no_more_than_so_many_jobs_run_at_a_time_and_the_next_is_asked_for_when_there_is_room(
    tmp_path: Path, job: Make
) -> None:
    sleepers = Sleepers()
    asked_for: list[int] = []

    def source() -> Any:
        for seed in range(4):
            asked_for.append(seed)
            yield job(seed)

    after(0.7, lambda: asked_for.append(-1) or sleepers.jobs[0].kill())  # type: ignore[func-returns-value]
    after(1.4, lambda: [each.kill() for each in sleepers.jobs])
    after(2.1, lambda: [each.kill() for each in sleepers.jobs])
    after(2.8, lambda: [each.kill() for each in sleepers.jobs])
    made = pool(tmp_path, start=sleepers, jobs=2).make(source())
    assert asked_for == [0, 1, -1, 2, 3]
    assert statuses(made.outcomes) == ["failed"] * 4


def test_what_runs_is_ended_when_the_budget_is_used_up(tmp_path: Path, job: Make) -> None:
    ledger = tmp_path / "ledger.jsonl"
    sleepers = Sleepers()

    def spends(*arguments: Any) -> Any:
        process = sleepers(*arguments)
        line = Attempt(run="x", sweep="sweep", usd=0.9, wall_seconds=10.0, status=RUNNING)
        ledger.write_text(as_line(line) + "\n")
        return process

    made = pool(tmp_path, start=spends, budget=Budget("sweep", ledger, 1.0)).make([job(seed) for seed in range(3)])
    assert [each.wait() for each in sleepers.jobs] == [-signal.SIGTERM]  # a run saves its checkpoint
    assert statuses(made.outcomes) == ["ended"]
    assert made.stopped == "budget.usd=1 was used up"


def test_a_job_that_may_be_too_dear_waits_for_those_that_run(tmp_path: Path, job: Make) -> None:
    ledger = tmp_path / "ledger.jsonl"
    sleepers = Sleepers()

    def spends(*arguments: Any) -> Any:
        line = Attempt(run=str(len(sleepers.jobs)), sweep="sweep", usd=1.0, wall_seconds=1000.0, status=FINISHED)
        with ledger.open("a") as file:
            file.write(as_line(line) + "\n")
        after(0.5, lambda: [each.kill() for each in sleepers.jobs])
        return sleepers(*arguments)

    limited = pool(tmp_path, start=spends, jobs=2, budget=Budget("sweep", ledger, 3.5))
    made = limited.make([job(seed) for seed in range(5)])
    assert len(sleepers.jobs) == 3
    assert made.stopped == "budget.usd=3.5 has $0.5 left, and the next run needs about $1"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_jobs_with_a_checkpoint_each_and_says_how_to_go_on(
    number: signal.Signals, tmp_path: Path, job: Make
) -> None:
    sleepers = Sleepers()

    def once_both_run() -> None:  # and the pool, which started them, listens
        while len(sleepers.jobs) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    after(0.1, once_both_run)
    made = pool(tmp_path, start=sleepers, jobs=2).make([job(seed) for seed in range(3)])
    assert [each.wait() for each in sleepers.jobs] == [-signal.SIGTERM] * 2
    assert statuses(made.outcomes) == ["ended", "ended"]
    with pytest.raises(Interrupted, match=f"{number.name}: 2 jobs were ended and go on .* same command") as error:
        made.raise_if_interrupted()
    assert error.value.exit_status == 128 + number


def test_a_mistake_of_whoever_asks_for_runs_leaves_none_behind(tmp_path: Path, job: Make) -> None:
    sleepers = Sleepers()

    def source() -> Any:
        yield job(0)
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        pool(tmp_path, start=sleepers, jobs=2).make(source())
    assert [each.wait() for each in sleepers.jobs] == [-signal.SIGTERM]


def test_jobs_are_spread_over_the_gpus_there_are(tmp_path: Path, job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    sleepers = Sleepers()
    after(1.0, lambda: [each.kill() for each in sleepers.jobs])
    made = pool(tmp_path, start=sleepers, jobs=3, devices=Devices.gpus(2))
    made.make([job(seed) for seed in range(3)])
    assert [each["CUDA_VISIBLE_DEVICES"] for each in sleepers.environments] == ["3", "5", "3"]
    assert [made.runs.noted(job(seed).hash)["neighbours"] for seed in range(3)] == [1, 0, 1]
    pairs = Devices.gpus(4).groups(2)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in pairs] == ["3,5", "6,7"]


def test_a_job_that_outlived_its_sweep_is_waited_for_and_not_made_again(tmp_path: Path, job: Make) -> None:
    sleepers = Sleepers()
    made = pool(tmp_path, start=sleepers)
    folder = made.runs.of(job(0).hash)
    folder.mkdir(parents=True)
    orphan = sleeping([f"run_dir={folder}"])
    made.runs.note(job(0).hash, {"pid": orphan.pid, "began": began(orphan.pid), "sweep": 1})

    def finishes() -> None:
        write_summary(folder)
        orphan.kill()
        orphan.wait()

    after(1.0, finishes)
    assert statuses(made.make([job(0)]).outcomes) == ["finished"]
    assert not sleepers.jobs


def test_a_job_beside_one_that_outlived_its_sweep_is_not_timed_alone(tmp_path: Path, job: Make) -> None:
    sleepers = Sleepers()
    made = pool(tmp_path, start=sleepers, jobs=2)
    folder = made.runs.of(job(0).hash)
    folder.mkdir(parents=True)
    orphan = sleeping([f"run_dir={folder}"])
    noted = {"pid": orphan.pid, "began": began(orphan.pid), "sweep": 1, "neighbours": 0, "load_average": 0.125}
    made.runs.note(job(0).hash, noted)

    def finishes() -> None:
        write_summary(folder)
        for each in (orphan, *sleepers.jobs):
            each.kill()
        orphan.wait()

    after(1.0, finishes)
    made.make([job(0), job(1)])
    assert [made.runs.noted(job(seed).hash)["neighbours"] for seed in range(2)] == [1, 1]
    assert made.runs.noted(job(0).hash) == noted | {"neighbours": 1}  # of when it began, and of who began it


def test_a_job_that_outlived_its_sweep_is_ended_with_the_next_one(tmp_path: Path, job: Make) -> None:
    made = pool(tmp_path, start=Sleepers())
    folder = made.runs.of(job(0).hash)
    folder.mkdir(parents=True)
    orphan = sleeping([f"run_dir={folder}"])
    made.runs.note(job(0).hash, {"pid": orphan.pid, "began": began(orphan.pid), "sweep": 1})
    after(0.6, lambda: os.kill(os.getpid(), signal.SIGINT))
    after(1.2, orphan.wait)
    assert statuses(made.make([job(0)]).outcomes) == ["ended"]
    assert orphan.wait() == -signal.SIGTERM


def test_a_job_of_another_sweep_is_not_waited_for_once_this_one_ends(tmp_path: Path, job: Make) -> None:
    made = pool(tmp_path, start=Sleepers())
    folder = made.runs.of(job(0).hash)
    folder.mkdir(parents=True)
    others = sleeping([f"run_dir={folder}"])
    made.runs.note(
        job(0).hash,
        {"pid": others.pid, "began": began(others.pid), "sweep": os.getpid(), "sweep_began": began(os.getpid())},
    )  # its sweep is alive
    after(0.6, lambda: os.kill(os.getpid(), signal.SIGINT))
    ended = made.make([job(0)])
    assert others.poll() is None
    others.kill()
    assert [(each.status, each.says) for each in ended.outcomes] == [
        ("ended", "interrupted by SIGINT; another sweep goes on with it")
    ]
    with pytest.raises(Interrupted, match="0 jobs were ended"):
        ended.raise_if_interrupted()


def test_of_two_sweeps_that_come_to_a_run_in_the_same_moment_one_makes_it(tmp_path: Path, job: Make) -> None:
    sleepers = Sleepers()
    made = pool(tmp_path, start=sleepers)
    folder = made.runs.of(job(0).hash)
    others = sleeping([f"run_dir={folder}"])
    starting = os.open(made.runs.starting().lock_file, os.O_CREAT | os.O_RDWR)
    fcntl.flock(starting, fcntl.LOCK_EX)  # the other one has looked, and found nobody at work

    def notes() -> None:
        made.runs.note(job(0).hash, {"pid": others.pid, "began": began(others.pid), "sweep": 1})
        os.close(starting)

    def finishes() -> None:
        write_summary(folder)
        others.kill()
        others.wait()

    after(0.5, notes)
    after(1.2, finishes)
    assert statuses(made.make([job(0)]).outcomes) == ["finished"]
    assert not sleepers.jobs


def test_a_job_that_was_killed_is_said_to_be_rather_than_its_last_line(tmp_path: Path, job: Make) -> None:
    def starts(_: Any, output: Any, __: Any) -> Ended:
        output.write(" 31%  step 10  loss 4.2\n")
        output.flush()
        return Ended(-signal.SIGKILL)

    (outcome,) = pool(tmp_path, start=starts).make([job(0)]).outcomes
    assert outcome.says == "killed by signal 9 (Killed, as by a system that is out of memory)"


def test_only_jobs_whose_budget_a_sweep_holds_end_with_it(tmp_path: Path, job: Make) -> None:
    sleepers = Sleepers()
    for seed, usd in enumerate((None, 1.0)):
        after(0.5, lambda: [each.kill() for each in sleepers.jobs])
        pool(tmp_path, start=sleepers, budget=Budget("sweep", tmp_path / "ledger.jsonl", usd)).make([job(seed)])
    without, held = sleepers.environments
    assert HELD_BY not in without
    assert is_alive(held[HELD_BY])
    assert not is_alive(f"{os.getpid()},1.0")  # a later process with its number
    dead = sleeping()
    of_dead = f"{dead.pid},{began(dead.pid)}"
    assert is_alive(of_dead)
    dead.kill()
    wait_until_dead = time.monotonic() + 10
    while is_alive(of_dead) and time.monotonic() < wait_until_dead:
        time.sleep(0.01)
    assert not is_alive(of_dead)  # whether or not anybody has asked how it ended
    dead.wait()
    assert not is_alive(of_dead)


def test_what_a_job_logs_is_shown_to_a_watcher_who_may_end_it(tmp_path: Path, job: Make) -> None:
    sleepers, seen = Sleepers(), []
    made = pool(tmp_path, start=sleepers)
    file = made.runs.of(job(0).hash) / "metrics.jsonl"

    def watch(_: Job, rows: Any) -> str | None:
        seen.extend(row["step"] for row in rows)
        return "it is hopeless" if 2 in seen else None

    def logs() -> None:
        file.parent.mkdir(parents=True)
        file.write_text('{"step": 1}\n{"step": 2}\n{"st')

    after(0.5, logs)
    (outcome,) = made.make([job(0)], watch).outcomes
    assert seen == [1, 2]
    assert (outcome.status, outcome.says) == ("ended", "it is hopeless")
    assert sleepers.jobs[0].wait() == -signal.SIGTERM
