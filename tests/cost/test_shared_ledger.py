"""The ledger that all runs share: lines stay whole beside other writers, the last one holds, kills are survived."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from moe_train.cost.attempt import Attempt
from moe_train.cost.ledger import Ledger
from moe_train.cost.shared_ledger import SharedLedger, read_ledger
from moe_train.errors import UserError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outputs/ledger.jsonl"


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_last_line_of_an_attempt_holds(path: Path, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.json", Attempt(name="one"), SharedLedger(path))
    ledger.heartbeat(100.0, 90.0, usd=0.5)
    ledger.finish("finished")
    Ledger(tmp_path / "other.json", Attempt(name="two"), SharedLedger(path))
    attempts, unreadable = read_ledger(path)
    assert [(a.name, a.status, a.wall_seconds, a.usd) for a in attempts] == [
        ("one", "finished", 100.0, 0.5),
        ("two", "running", 0.0, None),
    ]
    assert unreadable == 0


def test_lines_grow_with_the_logarithm_of_time_and_are_never_a_twentieth_behind(path: Path, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.json", shared=SharedLedger(path), clock=iter(range(10**6)).__next__)
    for second in range(1, 3601):
        ledger.heartbeat(float(second), 0.0, force=True)
        assert lines(path)[-1]["wall_seconds"] >= min(second - 1, second / 1.05 - 1) if second % 97 == 0 else True
    assert len(lines(path)) < 140


def test_a_line_cut_short_is_passed_over_and_does_not_spoil_the_next(path: Path, tmp_path: Path) -> None:
    shared = SharedLedger(path)
    shared.append(Attempt(name="before", status="finished"))
    with path.open("a") as file:
        file.write('{"name": "cut", "sta')
    shared.append(Attempt(name="after", status="finished"))
    attempts, unreadable = read_ledger(path)
    assert [attempt.name for attempt in attempts] == ["before", "after"]
    assert unreadable == 1


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "a", "status": "running", "updated_at": "2026-11-25T02:42:50"}',  # in which zone?
        '{"id": "a", "status": "running", "updated_at": "not a date"}',
        '{"status": "finished", "usd": 1.0}',  # of which attempt?
        '{"id": "a", "usd": -1.0}',
        '{"id": "a", "wall_seconds": "long"}',
        "[]",
        "\x00\xff",
    ],
)
def test_a_line_that_makes_no_sense_spoils_no_other(line: str, path: Path) -> None:
    SharedLedger(path).append(Attempt(name="sound", status="finished"))
    with path.open("a") as file:
        file.write(line + "\n")
    attempts, unreadable = read_ledger(path)
    assert ([attempt.name for attempt in attempts], unreadable) == (["sound"], 1)


def test_lines_of_other_versions_are_read_as_far_as_they_go(path: Path) -> None:
    SharedLedger(path)
    path.write_text('{"id": "a", "usd": 2.0, "status": "finished", "of_a_later_version": [1]}\n')
    (attempt,), unreadable = read_ledger(path)
    assert (attempt.usd, attempt.tokens, unreadable) == (2.0, 0, 0)


def test_an_attempt_killed_without_a_word_is_known_to_a_second_from_its_folder(path: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    ledger = Ledger(run / "ledger.json", Attempt(run=str(run)), SharedLedger(path))
    ledger.heartbeat(100.0, 90.0, force=True)
    ledger.heartbeat(101.0, 91.0, force=True)  # not due in the shared file
    assert lines(path)[-1]["wall_seconds"] == 100.0
    (attempt,), _ = read_ledger(path)
    assert (attempt.status, attempt.wall_seconds) == ("running", 101.0)
    silent_since(run / "ledger.json", 60)
    (attempt,), _ = read_ledger(path)
    assert (attempt.status, attempt.wall_seconds) == ("killed", 101.0)


def silent_since(file: Path, seconds: float) -> None:
    content = json.loads(file.read_text())
    for attempt in content["attempts"]:
        attempt["updated_at"] = (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()
    file.write_text(json.dumps(content))


def test_a_killed_attempt_whose_folder_is_gone_is_known_from_the_shared_file(path: Path) -> None:
    long_ago = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    SharedLedger(path).append(Attempt(run="/nowhere", wall_seconds=100.0, usd=0.5, updated_at=long_ago))
    (attempt,), _ = read_ledger(path)
    assert (attempt.status, attempt.usd) == ("killed", 0.5)


def test_resuming_settles_the_attempt_that_was_killed(path: Path, tmp_path: Path) -> None:
    account = tmp_path / "ledger.json"
    first = Ledger(account, Attempt(), SharedLedger(path))
    first.heartbeat(100.0, 90.0, force=True)
    first.heartbeat(101.0, 91.0, force=True)
    second = Ledger(account, Attempt(), SharedLedger(path))
    second.lost_seconds(80.0)
    second.finish("finished")
    (killed, resumed), _ = read_ledger(path)
    assert (killed.status, killed.wall_seconds) == ("killed", 101.0)
    assert (resumed.status, resumed.lost_seconds) == ("finished", 11.0)


def test_seconds_lost_once_are_counted_once_over_several_resumptions(tmp_path: Path) -> None:
    account = tmp_path / "ledger.json"
    first = Ledger(account)
    first.heartbeat(100.0, 100.0, force=True)
    second = Ledger(account)
    assert second.lost_seconds(80.0) == 20  # 20 of 100 were beyond the checkpoint
    second.heartbeat(50.0, 50.0, force=True)
    third = Ledger(account)
    assert third.lost_seconds(130.0) == 20
    assert [second.attempt.lost_seconds, third.attempt.lost_seconds] == [20, 0]


WRITER = """
import sys
from pathlib import Path
from moe_train.cost.attempt import Attempt
from moe_train.cost.ledger import Ledger
from moe_train.cost.shared_ledger import SharedLedger
number = sys.argv[2]
folder = Path(sys.argv[1]).parent / number
folder.mkdir()
for run in range(5):
    attempt = Attempt(name=f"{number}-{run}", price_source="x" * 500)
    ledger = Ledger(folder / f"{run}.json", attempt, SharedLedger(Path(sys.argv[1])))
    for second in range(40):
        ledger.heartbeat(float(2**second), 0.0, force=True, usd=1.0)
    ledger.finish("finished")
"""


def test_eight_writers_at_once_lose_nothing(path: Path) -> None:
    path.parent.mkdir()
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(number)]) for number in range(8)]
    assert [writer.wait() for writer in writers] == [0] * 8
    attempts, unreadable = read_ledger(path)
    assert unreadable == 0
    assert len(attempts) == 40
    assert {attempt.status for attempt in attempts} == {"finished"}
    assert len(path.read_text().splitlines()) == 40 * (1 + 40 + 1)


def test_a_place_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file/ledger.jsonl", tmp_path):
        with pytest.raises(UserError, match=r"cannot be written|no ordinary file"):
            SharedLedger(bad)


def test_reading_a_ledger_that_is_not_there_says_where_it_was_looked_for(path: Path) -> None:
    with pytest.raises(UserError, match="there is no ledger"):
        read_ledger(path)
    path.mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be read"):
        read_ledger(path)
