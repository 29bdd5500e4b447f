"""An error is said once, and always."""

from __future__ import annotations

import pytest

from moe_train.errors import say


@pytest.mark.parametrize(
    ("environment", "speaks"),
    [
        ({}, True),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, False),
        ({"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "0"}, True),  # the first of its machine
        ({"WORLD_SIZE": "2", "RANK": "1"}, False),
        ({"RANK": "1"}, True),  # left over: there is nobody else
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "x"}, True),
        ({"WORLD_SIZE": "2", "RANK": "2"}, True),  # wrong, which is to be said
        ({"WORLD_SIZE": "2", "RANK": "¹"}, True),
    ],
)
def test_of_the_processes_of_a_machine_one_speaks(
    environment: dict[str, str], speaks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    say("error: a mistake")
    say("error: of one process", of_one_process=True)
    assert capsys.readouterr().err.splitlines() == ["error: a mistake"] * speaks + ["error: of one process"]
