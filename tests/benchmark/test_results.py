"""Result files take up what was measured again and keep everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_train.benchmark import results
from moe_train.benchmark.ceilings import Ceilings
from moe_train.benchmark.figures import Figure, estimate
from moe_train.benchmark.results import content_of, merged, read, results_file
from moe_train.benchmark.tables import show, show_device
from moe_train.errors import UserError
from moe_train.training.runtime import Runtime

CEILINGS = Ceilings("float32", estimate([0.1]), estimate([10.0]), {"1 × 2 × 3": estimate([0.05])})


def content(runtime: Runtime, *suites: str, value: float = 1.0) -> dict[str, Any]:
    figures = [Figure(suite, "speed", value, "ratio", spread=(value, value), repetitions=3) for suite in suites]
    made = content_of(runtime, suites, CEILINGS, figures, load=0.0)
    return json.loads(json.dumps(made))  # as it comes back from a file


def test_a_suite_measured_again_replaces_its_figures_and_no_others(runtime: Runtime) -> None:
    first, again = content(runtime, "step", "tax"), content(runtime, "tax", value=2.0)
    both = merged(first, again)
    assert {(f["suite"], f["value"]) for f in both["figures"]} == {("step", 1.0), ("tax", 2.0)}
    assert [run["suites"] for run in both["runs"]] == [["step"], ["tax"]]
    assert merged(both, content(runtime, "step", "tax", value=3.0))["runs"] == content(runtime, "step", "tax")["runs"]


def test_what_a_result_is_from_stands_beside_it(runtime: Runtime) -> None:
    made = content(runtime, "step")
    assert {"device", "num_threads", "versions", "figures"} <= set(made)
    assert {"suite", "name", "value", "unit", "spread"} <= set(made["figures"][0])
    (run,) = made["runs"]
    assert {"date", "command", "versions", "num_threads", "ceilings"} <= set(run)
    assert run["ceilings"]["matmul"] == [0.1, 0.1, 0.1, 1]


def test_results_of_another_device_and_other_files_are_not_touched(runtime: Runtime, tmp_path: Path) -> None:
    other = content(runtime, "step") | {"device": "another"}
    with pytest.raises(UserError, match=r"these results are of another, not of"):
        merged(other, content(runtime, "tax"))
    assert read(tmp_path / "none.json") is None
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="holds no results of a benchmark"):
        read(tmp_path / "list.json")


def test_a_device_has_a_file_of_its_own_and_a_cpu_one_for_each_number_of_threads(runtime: Runtime) -> None:
    file = results_file(runtime)
    assert file.parent == results.RESULTS
    assert file.name.endswith("_1_threads.json")
    assert " " not in file.name


def test_every_unit_and_a_missing_figure_are_shown(runtime: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    units = ("tokens/s", "share", "ratio", "s", "count", "bytes")
    figures = [Figure("step", f"figure_{unit}", 0.5, unit) for unit in units]
    figures.append(Figure("step", "lacking", None, "s", note="no such device"))
    show_device(runtime, CEILINGS, load=2.0)
    show(figures)
    said = capsys.readouterr().out
    for text in ("50%", "0.500", "not measured", "lacking: no such device", "GB/s", "1 × 2 × 3", "2.0 processes"):
        assert text in said
