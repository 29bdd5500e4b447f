"""Result files take up what was measured again and keep everything else."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.benchmark import results
from moe_train.benchmark.ceilings import Ceilings
from moe_train.benchmark.figures import Figure, doubts, estimate, marked
from moe_train.benchmark.results import check_file, content_of, merged, read, results_file, save
from moe_train.benchmark.tables import show, show_device
from moe_train.errors import UserError
from moe_train.training.runtime import Runtime

CEILINGS = Ceilings("float32", estimate([0.1]), estimate([10.0]), {"1 × 2 × 3": estimate([0.05])})


def content(runtime: Runtime, suite: str, *of: str, value: float | None = 1.0) -> dict[str, Any]:
    spread = None if value is None else (value, value)
    figures = [Figure(suite, "speed", value, "ratio", each, spread, repetitions=3) for each in of or ("tiny",)]
    made = content_of(runtime, suite, (CEILINGS, CEILINGS), figures, load=0.0)
    return json.loads(json.dumps(made))  # as it comes back from a file


def found(content: dict[str, Any]) -> set[tuple[str, str, float | None]]:
    return {(each["suite"], each["of"], each["value"]) for each in content["figures"]}


def from_runs(content: dict[str, Any]) -> list[dict[str, list[str]]]:
    return [run["of"] for run in content["runs"]]


def test_figures_of_the_same_suite_and_thing_are_replaced_and_no_others(runtime: Runtime) -> None:
    file = merged(content(runtime, "step", "tiny", "base"), content(runtime, "tax", "tiny"))
    file = merged(file, content(runtime, "step", "tiny", value=2.0))
    assert found(file) == {("step", "base", 1.0), ("tax", "tiny", 1.0), ("step", "tiny", 2.0)}
    assert from_runs(file) == [{"step": ["base"]}, {"tax": ["tiny"]}, {"step": ["tiny"]}]
    assert [run["suites"] for run in file["runs"]] == [["step"], ["tax"], ["step"]]
    file = merged(file, content(runtime, "step", "base", value=3.0))
    assert from_runs(file) == [{"tax": ["tiny"]}, {"step": ["tiny"]}, {"step": ["base"]}]


def test_what_could_not_be_measured_replaces_nothing_that_was(runtime: Runtime) -> None:
    file = merged(content(runtime, "precision", "tiny"), content(runtime, "precision", "tiny", "base", value=None))
    assert found(file) == {("precision", "tiny", 1.0), ("precision", "base", None)}
    assert from_runs(file) == [{"precision": ["tiny"]}, {"precision": ["base"]}]


def test_of_older_files_whose_runs_do_not_say_what_they_are_of_nothing_is_lost(runtime: Runtime) -> None:
    old = merged(content(runtime, "step", "tiny", "base"), content(runtime, "tax", "tiny"))
    run = old["runs"][0] | {"suites": ["step", "tax"]}
    del run["of"]
    old |= {"runs": [run], "further": "kept"}
    file = merged(old, content(runtime, "step", "tiny", value=2.0))
    assert found(file) == {("step", "base", 1.0), ("tax", "tiny", 1.0), ("step", "tiny", 2.0)}
    assert from_runs(file) == [{"step": ["base"], "tax": ["tiny"]}, {"step": ["tiny"]}]
    assert file["further"] == "kept"


@pytest.mark.parametrize("path", sorted(results.RESULTS.glob("*_threads*.json")) + sorted(results.RESULTS.glob("nv*")))
def test_published_results_can_be_added_to_and_are_steady(path: Path, runtime: Runtime) -> None:
    before = json.loads(path.read_text())
    assert read(path, before["device"]) == before
    after = merged(before, content(runtime, "tax", "something else"))
    assert found(after) == found(before) | {("tax", "something else", 1.0)}
    traced = {(suite, of) for run in after["runs"] for suite, ofs in run["of"].items() for of in ofs}
    assert traced == {(suite, of) for suite, of, _ in found(after)}
    known = {field.name for field in dataclasses.fields(Figure)}
    figures = [Figure(**{key: value for key, value in each.items() if key in known}) for each in before["figures"]]
    assert doubts([marked(figure, None) for figure in figures]) is None


def test_two_that_save_at_once_lose_nothing_of_each_other(runtime: Runtime, tmp_path: Path) -> None:
    """Each reads the file as it is when it writes, and not as it was before it measured."""
    file = tmp_path / "results.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: save(file, content(runtime, "tax", f"model {n}")), range(40)))
    assert len(found(json.loads(file.read_text()))) == 40


def test_what_a_result_is_from_stands_beside_it(runtime: Runtime) -> None:
    made = content(runtime, "step")
    assert {"device", "num_threads", "cpu_kernels", "versions", "figures"} <= set(made)
    assert {"suite", "name", "value", "unit", "spread"} <= set(made["figures"][0])
    (run,) = made["runs"]
    assert {"date", "command", "versions", "num_threads", "ceilings"} <= set(run)
    assert run["ceilings"]["matmul"] == [0.1, 0.1, 0.1, 1]


def test_results_of_another_device_are_not_touched(runtime: Runtime, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    assert read(file, "any") is None
    file.write_text(json.dumps(content(runtime, "step") | {"device": "another"}))
    with pytest.raises(UserError, match=r"results.json is of another, not of .*: move it away, or use json=FILE"):
        check_file(file, runtime.device_name)


@pytest.mark.parametrize(
    "odd",
    [
        "[]",
        "{",
        "\xff",
        "[" * 100_000,
        '{"device": "cpu", "runs": [], "figures": {}}',
        '{"device": "cpu", "runs": [{}], "figures": []}',
        '{"device": "cpu", "runs": [{"suites": ["step"], "of": ["x"]}], "figures": []}',
        '{"device": "cpu", "runs": [], "figures": [{"suite": "step", "name": "x", "value": 1.0, "unit": "s"}]}',
        '{"device": 1, "runs": [], "figures": []}',
    ],
    ids=lambda text: text[:40],
)
def test_a_file_of_something_else_is_left_and_said(odd: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_bytes(odd.encode("latin-1"))
    with pytest.raises(UserError, match=r"results.json holds no results of a benchmark: move it away, or correct it"):
        check_file(file, "cpu")


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_measured() -> None:
    with pytest.raises(UserError, match=r"/proc/none cannot be written .*: use json=FILE, not save=true"):
        check_file(Path("/proc/none/results.json"), "cpu")


@pytest.mark.parametrize(
    ("kernels", "dtype", "notes", "reason"),
    [
        ("compiled", torch.bfloat16, ("cpu_kernels=auto took the project's own",), None),
        ("torch", torch.float32, (), "those in C multiply in BF16, and this does not"),
        ("torch", torch.bfloat16, (), "cpu_kernels=torch asks for them"),
        ("torch", torch.bfloat16, ("cpu_kernels=auto took torch's operations: no C compiler",), "no C compiler"),
        (None, torch.bfloat16, (), None),
    ],
)
def test_whose_kernels_a_cpu_ran_is_said_and_why(
    kernels: Any, dtype: torch.dtype, notes: tuple[str, ...], reason: str | None, runtime: Runtime,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ran = dataclasses.replace(runtime, cpu_kernels=kernels, dtype=dtype, notes=notes)
    made = content_of(ran, "step", (CEILINGS, CEILINGS), [], load=0.0)
    assert (made["cpu_kernels"], made["cpu_kernels_reason"]) == (kernels, reason)
    show_device(ran, CEILINGS, load=0.0)
    said = " ".join(capsys.readouterr().out.split())
    assert ("kernels in C," in said, "torch's kernels," in said) == (kernels == "compiled", kernels == "torch")
    assert reason is None or reason in said


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
