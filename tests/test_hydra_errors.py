"""What hydra's launcher for clusters says, in words; the other mistakes are in end_to_end/test_bad_input.py."""

from __future__ import annotations

import pytest
from hydra.errors import MissingConfigException
from submitit.core.utils import UncompletedJobError

from moe_train import hydra_errors
from moe_train.hydra_errors import explain_hydra_error


def missing(launcher: str) -> str:
    options = "Available options in 'hydra/launcher':\n\tbasic"
    text = f"In 'hydra/config': Could not find 'hydra/launcher/{launcher}'\n\n{options}"
    return str(explain_hydra_error(MissingConfigException(text, None)))


def test_a_launcher_that_is_not_installed_is_told_from_one_that_is_misspelt(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "choose one of basic" in missing("submitit_slrum")
    monkeypatch.setattr(hydra_errors, "find_spec", lambda name: None)
    assert missing("submitit_slurm") == 'hydra/launcher=submitit_slurm is not installed: pip install -e ".[slurm]"'


def test_a_job_that_left_no_result_leads_to_what_it_said() -> None:
    lost = UncompletedJobError(
        "Job 7 (task: 0) with path /grid/.submitit/7/7_0_result.pkl\nhas not produced any output"
    )
    expected = "a job of the cluster was killed or lost: what it said is in /grid/.submitit/7"
    assert str(explain_hydra_error(lost)) == expected
