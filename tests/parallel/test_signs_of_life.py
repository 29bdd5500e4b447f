"""Every process of a run has a log that shows whether it lives, in a folder that all see."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.errors import UserError
from moe_train.parallel import signs_of_life
from moe_train.parallel.signs_of_life import SignsOfLife, is_of_the_network


def test_who_gives_no_sign_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs_of_life, "EVERY_SECONDS", 0.05)
    monkeypatch.setattr(signs_of_life, "SILENT_SECONDS", 1.0)
    living = SignsOfLife(tmp_path, 0)
    living.path_of(1).write_text("said something once")  # and 2 never anything
    assert living.silent(3) == [1, 2]


def test_an_error_is_in_the_log_with_the_way_to_it(tmp_path: Path) -> None:
    signs = SignsOfLife(tmp_path, 3)
    try:
        raise ValueError("what went wrong")
    except ValueError as error:
        signs.failed(error)
    text = signs.path_of(3).read_text()
    assert "process 3 on" in text
    assert "ValueError: what went wrong" in text
    assert "test_signs_of_life.py" in text


def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    elsewhere = SignsOfLife(tmp_path / "run", 1)
    with pytest.raises(UserError, match="does not see the run folder of process 0"):
        elsewhere.check_shared()
    SignsOfLife(tmp_path / "run", 0)
    elsewhere.check_shared()


def test_an_error_of_the_network_is_told_from_one_of_our_own() -> None:
    closed = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    assert is_of_the_network(closed)
    assert is_of_the_network(
        RuntimeError("Application timeout caused pair closure")
    )  # as gloo says it of a stopped process
    assert not is_of_the_network(RuntimeError("shape '[3]' is invalid for input of size 4"))
