"""The account of attempts survives a kill at any moment and loses none of an earlier attempt's time."""

import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.cost.ledger import Attempt, Ledger
from moe_train.errors import UserError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.json"


def attempts(path: Path) -> list[dict[str, object]]:
    return json.loads(path.read_text())["attempts"]


def test_a_run_is_on_record_from_the_moment_it_opens_its_ledger(path: Path) -> None:
    ledger = Ledger(path, already_elapsed=60.0)
    (attempt,) = attempts(path)
    assert (attempt["status"], attempt["wall_seconds"], attempt["train_seconds"]) == ("running", 60.0, 0.0)
    started = datetime.fromisoformat(str(attempt["started_at"]))
    assert timedelta(seconds=59) <= datetime.now(UTC) - started <= timedelta(seconds=90)
    assert ledger.earlier_wall_seconds == 0


def test_a_finished_attempt_keeps_its_last_clocks_and_its_status(path: Path) -> None:
    ledger = Ledger(path)
    ledger.heartbeat(10.0, 8.0)
    ledger.finish("completed")
    second = Ledger(path)
    assert [attempt.status for attempt in second.earlier] == ["completed"]
    assert second.earlier_wall_seconds == 10
    assert [attempt["status"] for attempt in attempts(path)] == ["completed", "running"]


def test_an_attempt_that_never_finished_was_killed_and_its_time_counts(path: Path) -> None:
    first = Ledger(path)
    first.heartbeat(10.0, 8.0, force=True)
    second = Ledger(path)
    second.heartbeat(5.0, 4.0, force=True)
    third = Ledger(path)
    assert [attempt.status for attempt in third.earlier] == ["killed", "killed"]
    assert third.earlier_wall_seconds == 15
    assert third.lost_seconds(train_seconds_at_checkpoint=9.0) == 3


def test_a_checkpoint_ahead_of_the_last_heartbeat_lost_nothing(path: Path) -> None:
    Ledger(path).heartbeat(10.0, 8.0, force=True)
    assert Ledger(path).lost_seconds(8.5) == 0


def test_heartbeats_are_written_once_a_second_unless_forced(path: Path) -> None:
    now = 0.0
    ledger = Ledger(path, clock=lambda: now)

    def written() -> object:
        return attempts(path)[-1]["wall_seconds"]

    now = 0.9
    ledger.heartbeat(0.9, 0.5)
    assert written() == 0
    now = 1.0
    ledger.heartbeat(1.0, 0.5)
    assert written() == 1.0
    now = 1.5
    ledger.heartbeat(1.5, 0.5)
    assert written() == 1.0
    ledger.heartbeat(1.6, 0.5, force=True)
    assert written() == 1.6


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), min_size=1, max_size=6), st.floats(0, 1e6))
def test_no_attempt_is_ever_forgotten(tmp_path_factory, clocks: list[tuple[float, float]], kept: float) -> None:
    path = tmp_path_factory.mktemp("run") / "ledger.json"
    for wall, train in clocks:
        Ledger(path).heartbeat(wall, train, force=True)
    last = Ledger(path)
    assert last.earlier_wall_seconds == pytest.approx(sum(wall for wall, _ in clocks))
    assert last.lost_seconds(kept) == pytest.approx(max(0.0, sum(train for _, train in clocks) - kept))


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        '{"attempts": [{"sta',
        "[]",
        '{"attempts": [{"started_at": "x", "wall_seconds": -1, "train_seconds": 0, "status": "killed"}]}',
        '{"attempts": [{"started_at": "x", "wall_seconds": NaN, "train_seconds": 0, "status": "killed"}]}',
        '{"attempts": [{"started_at": "x", "wall_seconds": 1, "status": 3}]}',
    ],
)
def test_a_damaged_ledger_is_named_and_left_as_it_is(path: Path, damaged: str) -> None:
    path.write_text(damaged)
    with pytest.raises(UserError, match=r"ledger\.json is damaged"):
        Ledger(path)
    assert path.read_text() == damaged


def test_the_account_is_replaced_as_a_whole(path: Path) -> None:
    ledger = Ledger(path)
    with path.open() as reader:
        ledger.heartbeat(10.0, 8.0, force=True)
        assert json.load(reader)["attempts"][0]["wall_seconds"] == 0  # the old file, untouched
    assert attempts(path)[0]["wall_seconds"] == 10


def test_a_half_written_temporary_file_of_a_killed_process_does_no_harm(path: Path) -> None:
    Ledger(path).heartbeat(10.0, 8.0, force=True)
    path.with_name("ledger.json.tmp").write_text('{"attempts": [{"sta')
    assert Ledger(path).earlier_wall_seconds == 10


WRITER = """
import sys
from pathlib import Path
from moe_train.cost.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
print("open", flush=True)
seconds = 0
while True:
    seconds += 1
    ledger.heartbeat(seconds, seconds, force=True)
    if seconds % 200 == 0:
        print(seconds, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_account(path: Path) -> None:
    root = str(Path(__file__).parents[2])
    told = []
    for lines in (1, 2, 5):  # killed while opening, soon, later: each time amid writes
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": root},
        ) as process:
            assert process.stdout is not None
            last = [process.stdout.readline() for _ in range(lines)][-1]
            process.send_signal(signal.SIGKILL)
        told.append(0 if last == "open\n" else int(last))
    ledger = Ledger(path)
    assert [attempt.status for attempt in ledger.earlier] == ["killed"] * 3
    assert all(attempt.wall_seconds >= seen for attempt, seen in zip(ledger.earlier, told, strict=True))
    assert isinstance(ledger.earlier[0], Attempt)
