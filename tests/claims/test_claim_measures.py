"""What a comparison takes from a run, and what it says where there is nothing to take."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.claims import measures
from moe_train.claims.axes import cost
from moe_train.claims.loss_curves import POINTS, curves_of
from moe_train.claims.made_up import PRICE, write_run
from moe_train.claims.plan import Plan
from moe_train.claims.results import Folder, Result
from moe_train.cost.attempt import FINISHED, Attempt, as_line
from moe_train.errors import UserError
from moe_train.forecast import probe as probes


@pytest.fixture
def made(plan_of: Callable[..., Plan], tmp_path: Path) -> tuple[Result, Folder]:
    plan, folder = plan_of(), Folder(tmp_path / "out")
    run = plan.runs(plan.untuned())[0]
    write_run(plan.arms[run.arm], run, folder, 2.0)
    result = folder.result(run)
    assert result is not None
    return result, folder


def test_balance_is_that_of_the_last_third(made: tuple[Result, Folder]) -> None:
    result, folder = made
    steps = result.summary["steps"]
    rows = [{"step": step, "moe/max_violation": 1.0 if step <= steps * 2 / 3 else 0.2} for step in range(1, steps + 1)]
    assert measures.value("max_violation", dataclasses.replace(result, rows=rows), folder) == pytest.approx(0.2)
    dense = [{"step": steps}]
    with pytest.raises(UserError, match="logged no expert load"):
        measures.value("max_violation", dataclasses.replace(result, rows=dense), folder)


def test_optimizer_states_are_weighed_in_the_checkpoint(made: tuple[Result, Folder]) -> None:
    result, folder = made
    with pytest.raises(UserError, match="cannot be weighed"):
        measures.value("optimizer_bytes_per_param", result, folder)
    (place,) = (result.folder / "checkpoints").iterdir()
    place.rename(result.folder / "elsewhere")
    with pytest.raises(UserError, match="has no checkpoint to weigh"):
        measures.value("optimizer_bytes_per_param", result, folder)
    (result.folder / "elsewhere").rename(place)
    moments = {name: torch.zeros(100, 4, dtype=torch.bfloat16) for name in ("exp_avg", "exp_avg_sq")}
    torch.save([{"state": {0: moments | {"step": torch.tensor(3.0)}}}], place / "optimizers.pt")
    small = dataclasses.replace(result, summary=result.summary | {"total_params": 400})
    for _ in range(2):
        assert measures.value("optimizer_bytes_per_param", small, folder) == 4.0
        shutil.rmtree(place, ignore_errors=True)  # to save room: what was weighed is kept


def test_what_generating_measured_is_kept_beside_the_run(made: tuple[Result, Folder]) -> None:
    result, folder = made
    with pytest.raises(UserError, match=r"generating with arm one failed: .*no checkpoint"):
        measures.value("cache_elements", result, folder)
    measures.Beside(result, folder, "generation").keep({"cache_elements_per_token": 48})
    assert measures.value("cache_elements", result, folder) == 48
    another = dataclasses.replace(
        result, run=dataclasses.replace(result.run, config=dataclasses.replace(result.run.config, seed=7))
    )
    assert measures.value("cache_elements", another, folder) == 48  # shapes decide it: one run of a model is asked
    with pytest.raises(UserError, match="has no MTP module"):
        measures.value("generation_speed_up", result, folder)


def test_twenty_steps_are_held_against_what_the_run_took(
    made: tuple[Result, Folder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result, folder = made
    asked: list[tuple[list[str], int]] = []
    took = result.summary["train_seconds"]

    def probe(overrides: list[str], tokens: int) -> dict[str, Any]:
        asked.append((overrides, tokens))
        return {"device": result.summary["device_name"], "train_seconds": {"value": 0.8 * took}}

    monkeypatch.setattr(probes, "probe", probe)
    for _ in range(2):
        assert measures.value("forecast_error", result, folder, tmp_path) == pytest.approx(0.2)
    ((overrides, tokens),) = asked  # what it said is kept
    assert overrides[:2] == ["--config-dir", str(tmp_path)]
    assert set(result.run.overrides) < set(overrides)
    assert tokens == result.summary["tokens"]
    elsewhere = dataclasses.replace(result, summary=result.summary | {"device_name": "another"})
    with pytest.raises(UserError, match=r"was made on another and forecast on made up: remove .*forecast\.json"):
        measures.value("forecast_error", elsewhere, folder)


def test_what_a_kill_left_half_written_is_measured_again(made: tuple[Result, Folder]) -> None:
    result, folder = made
    half = folder.runs.beside(result.run.hash, ".generation.json")
    half.write_text('{"cache_elem')
    with pytest.raises(UserError, match=r"generating with arm one failed"):  # it is tried: there is no checkpoint
        measures.value("cache_elements", result, folder)


@pytest.mark.parametrize("name", ["generation", "optimizers", "forecast"])
def test_what_was_measured_of_a_run_does_not_outlive_it(name: str, made: tuple[Result, Folder]) -> None:
    """Its folder is removed and the run made again, somewhere else say: another attempt of the same hash."""
    result, folder = made
    measures.Beside(result, folder, name).keep({"bytes": 7})
    assert measures.Beside(result, folder, name).kept() == {"bytes": 7}
    (result.folder / "ledger.json").write_text(f'{{"attempts": [{as_line(Attempt(status=FINISHED))}]}}')
    assert measures.Beside(result, folder, name).kept() is None


def test_curves_keep_their_end_and_no_more_points_than_can_be_seen(made: tuple[Result, Folder]) -> None:
    result, _ = made
    last = result.rows[-1]
    rows = [last | {"step": step, "progress/tokens": step * 10, "train/loss": 1 / step} for step in range(1, 1000)]
    curve = curves_of([dataclasses.replace(result, rows=rows)], result.run.budget)["one"]
    assert len(curve["tokens"]) <= POINTS
    assert curve["tokens"][-1] == 9990
    assert curve["loss"]["mean"][-1] == pytest.approx(1 / 999, rel=1e-4)
    assert curve["seconds"][-1] == pytest.approx(999 * last["throughput/step_seconds"], rel=1e-4)


def test_loading_kernels_counts_neither_as_seconds_nor_as_dollars(made: tuple[Result, Folder]) -> None:
    """It takes as long in a run of any length: 24% of a run of 26M tokens on an H200."""
    result, _ = made
    rows = [dict(row) for row in result.rows]
    late = 3.0  # seconds
    rows[0]["throughput/step_seconds"] += late / rows[0]["step"]
    usd = late * PRICE / 3600
    for row in rows:
        row["cost/usd_train"] += usd
    figures = {"train_seconds": late + result.summary["train_seconds"], "usd_train": usd + result.summary["usd_train"]}
    slow = dataclasses.replace(result, rows=rows, summary=result.summary | figures)
    curve, same = (curves_of([each], result.run.budget)[result.run.arm] for each in (slow, result))
    for axis in ("seconds", "usd"):
        assert cost(axis, slow) == pytest.approx(cost(axis, result))
        assert curve[axis] == pytest.approx(same[axis], rel=1e-3)
        assert curve[axis][-1] == pytest.approx(cost(axis, slow), rel=1e-3)
