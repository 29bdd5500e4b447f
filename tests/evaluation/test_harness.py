"""The door to lm-evaluation-harness: what is asked of it is checked before anything is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from moe_train.errors import UserError
from moe_train.evaluation.harness import _figures, require_harness, run_tasks


def test_without_the_extra_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'not installed: pip install -e "\.\[eval\]"'):
        require_harness()


def test_a_folder_without_a_model_or_without_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no exported model .* scripts/export_hf.py"):
        run_tasks(tmp_path, ["any"])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="there is no such folder"):
        run_tasks(tmp_path, ["any"], include_path=tmp_path / "nowhere")


def test_figures_are_numbers_by_their_plain_names() -> None:
    given = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": "N/A", "exact,strict": 1, "sample_len": 3, "flag": True}
    assert _figures(given) == {"acc": 0.5, "exact,strict": 1.0}
