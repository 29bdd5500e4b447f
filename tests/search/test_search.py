"""A search makes its trials once, goes on where it was stopped, gives up bad runs and learns from what came out."""

from __future__ import annotations

import json
import math
import sqlite3
import threading
from pathlib import Path
from typing import Any

import optuna
import pytest
from made_up_searches import RATE, MadeUp, Process, Settings, asked, make
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from moe_train.cost.attempt import FINISHED, Attempt, as_line
from moe_train.errors import UserError
from moe_train.search import storage
from moe_train.search.points import front, points_of, without_result
from moe_train.search.search import Search


def valley(settings: Settings) -> dict[str, float]:
    """Lowest at a rate of 0.01."""
    return {"val_bits_per_byte": 1 + math.log10(settings["optimizer.lr"] / 0.01) ** 2}


def test_it_makes_as_many_runs_as_asked_and_finds_the_valley(tmp_path: Path) -> None:
    start = MadeUp(valley)
    search = Search(asked(tmp_path, trials=25))
    assert make(search, start).stopped is None
    assert len(start.started) == 25
    best = points_of(search.studies[0])[0]
    assert best.values[0] < 1.02
    assert {"cost.sweep": "mine", "cost.purpose": "tuning", "budget.usd": None}.items() <= start.started[0].items()


def test_a_search_that_is_started_again_makes_what_is_left(tmp_path: Path) -> None:
    start = MadeUp(valley)
    make(Search(asked(tmp_path, trials=3)), start)
    make(Search(asked(tmp_path, trials=5)), start)
    make(Search(asked(tmp_path, trials=5)), start)
    assert len(start.started) == 5
    assert len({settings["optimizer.lr"] for settings in start.started}) == 5  # not the same suggestions again


def test_every_level_has_a_study_of_its_own_and_they_take_turns(tmp_path: Path) -> None:
    start = MadeUp(valley)
    search = Search(asked(tmp_path, trials=2, for_each={"seed": {"kind": "choices", "choices": [5, 6]}}))
    make(search, start)
    assert [settings["seed"] for settings in start.started] == [5, 6, 5, 6]
    assert [len(points_of(study)) for study in search.studies] == [2, 2]


def test_a_grid_makes_every_combination_once_and_seeds_are_averaged_over(tmp_path: Path) -> None:
    choices = {
        "model.moe.top_k": {"kind": "choices", "choices": [1, 2, 99]},
        "seed": {"kind": "choices", "choices": [0, 1]},
    }
    start = MadeUp(
        lambda s: {"val_bits_per_byte": s["model.moe.top_k"] + 0.1 * s["seed"], "usd_total": 1.0 / s["model.moe.top_k"]}
    )
    grid = {"space": choices, "sampler": "grid", "trials": ..., "objectives": ["val_bits_per_byte", "usd_total"]}
    for _ in range(2):
        search = Search(asked(tmp_path, **grid))
        make(search, start)
    assert len(start.started) == 4
    (study,) = search.studies
    points = points_of(study)
    assert [(point.params, len(point.runs)) for point in points] == [
        ({"model.moe.top_k": 1}, 2),
        ({"model.moe.top_k": 2}, 2),
    ]
    assert points[0].values == pytest.approx((1.05, 1.0))
    assert points[0].spread == pytest.approx(0.1)
    assert front(points) == points[::-1]  # by dollars
    lost = without_result(study)
    assert (lost.failed, lost.pruned, lost.going) == (2, 0, 0)
    assert "top_k=99 is more than num_experts" in lost.reasons[0]


def test_the_front_is_what_nothing_else_is_better_than(tmp_path: Path) -> None:
    known = {1: (1.0, 3.0), 2: (2.0, 2.0), 3: (2.5, 2.5), 4: (3.0, 1.0), 5: (3.0, 1.5)}
    start = MadeUp(lambda s: dict(zip(("val_bits_per_byte", "usd_total"), known[s["model.moe.top_k"]])))
    choices = {"model.moe.top_k": {"kind": "choices", "choices": list(known)}}
    grid = {"space": choices, "sampler": "grid", "trials": ..., "objectives": ["val_bits_per_byte", "usd_total"]}
    search = Search(asked(tmp_path, **grid))
    make(search, start)
    assert [point.params["model.moe.top_k"] for point in front(points_of(search.studies[0]))] == [4, 2, 1]


def test_a_run_that_diverged_is_a_lesson_and_the_search_goes_on(tmp_path: Path) -> None:
    start = MadeUp(lambda settings: valley(settings) if settings["optimizer.lr"] < 0.02 else None)
    search = Search(asked(tmp_path, trials=12))
    make(search, start)
    states = [trial.state for trial in search.studies[0].trials()]
    assert set(states) == {TrialState.COMPLETE, TrialState.PRUNED}
    assert len(start.started) == 12


def test_settings_that_never_make_a_run_end_the_search_with_the_reason(tmp_path: Path) -> None:
    wrong = {"model.moe.top_k": {"kind": "int", "low": 50, "high": 99}}
    with pytest.raises(UserError, match=r"20 settings in a row make no run, the last since .*more than num_experts"):
        make(Search(asked(tmp_path, space=wrong)), MadeUp(valley))


def test_a_run_behind_the_others_after_as_many_tokens_is_given_up(tmp_path: Path, monkeypatch: Any) -> None:
    losses = iter([1.0, 1.1, 5.0])
    told: list[Process] = []

    def start(overrides: Any, output: Any, environment: Any) -> Process:
        loss = next(losses)
        process = MadeUp(lambda settings: {"val_bits_per_byte": loss})(overrides, output, environment)
        (folder,) = (Path(o.partition("=")[2].strip("'")) for o in overrides if o.startswith("run_dir="))
        row = {"step": 9, "progress/tokens": 2_100, "val/bits_per_byte": loss, "train/loss": loss}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        (folder / "summary.json").rename(folder / "later.json")
        process.status = None
        told.append(process)
        if loss < 5:  # it is left alone, and finishes
            threading.Timer(0.7, lambda: _finish(folder, process)).start()
        return process

    monkeypatch.setattr("moe_train.sweeps.running._signal", lambda process, number: setattr(process, "status", -15))
    pruning = {"kind": "median", "every_tokens": 1_000, "startup_trials": 2}
    search = Search(asked(tmp_path, trials=3, pruning=pruning))
    made = make(search, start)
    assert [outcome.status for outcome in made.outcomes] == ["finished", "finished", "ended"]
    assert made.outcomes[2].says == "given up after 2,100 tokens, being behind other runs"
    trials = search.studies[0].trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED]
    assert [trial.intermediate_values for trial in trials] == [{2_000: 1.0}, {2_000: 1.1}, {2_000: 5.0}]


def _finish(folder: Path, process: Process) -> None:
    (folder / "later.json").rename(folder / "summary.json")
    process.status = 0


def test_what_a_killed_worker_began_is_taken_up_and_a_living_ones_is_not(tmp_path: Path) -> None:
    first = Search(asked(tmp_path, trials=2))
    began = first.studies[0].ask()
    assert began is not None
    second = Search(asked(tmp_path, trials=2))
    start = MadeUp(valley)
    make(second, start)
    assert len(start.started) == 1  # the other one is somebody's
    first._worker._lock.release()  # as the system does for a process that is killed
    third = Search(asked(tmp_path, trials=2))
    make(third, start)
    rates = [trial.params["optimizer.lr"] for trial in third.studies[0].trials()]
    assert start.started[1]["optimizer.lr"] == pytest.approx(rates[0], rel=1e-5)
    assert [trial.state for trial in third.studies[0].trials()] == [TrialState.COMPLETE] * 2


def test_the_budget_is_that_of_the_whole_search(tmp_path: Path) -> None:
    made_up = MadeUp(valley)

    def paid(*of_a_job: Any) -> Any:
        process = made_up(*of_a_job)
        line = Attempt(run=str(len(made_up.started)), sweep="mine", usd=1.0, wall_seconds=1.0, status=FINISHED)
        with (tmp_path / "ledger.jsonl").open("a") as file:
            file.write(as_line(line) + "\n")
        return process

    search = Search(asked(tmp_path, trials=9, usd=3.5))
    made = make(search, paid)
    assert made.stopped == "budget.usd=3.5 has $0.5 left, and the next run needs about $1"
    assert len(made_up.started) == 3
    assert search.usd_spent() == 3.0
    goes_on = Search(asked(tmp_path, trials=9, usd=5.5))
    make(goes_on, paid)
    assert len(made_up.started) == 5


def test_workers_that_start_together_do_not_suggest_the_same(tmp_path: Path) -> None:
    workers = [Search(asked(tmp_path, trials=8)) for _ in range(2)]
    jobs = [worker.studies[0].ask() for worker in workers for _ in range(4)]
    assert len({job.hash for job in jobs if job is not None}) == 8


def test_a_trial_whose_worker_was_killed_while_it_was_chosen_is_chosen_to_the_end(tmp_path: Path) -> None:
    space = {**RATE, "seed": {"kind": "choices", "choices": [5, 6]}}
    first = Search(asked(tmp_path, trials=1, space=space))
    half = first.studies[0]._study.ask()
    half.suggest_float("optimizer.lr", 0.001, 0.1, log=True)
    first._worker._lock.release()
    start = MadeUp(valley)
    make(Search(asked(tmp_path, trials=1, space=space)), start)
    (settings,) = start.started
    assert settings["optimizer.lr"] == pytest.approx(half.params["optimizer.lr"], rel=1e-5)
    assert settings["seed"] in (5, 6)


def test_a_grid_that_is_started_again_makes_what_failed(tmp_path: Path) -> None:
    choices = {"seed": {"kind": "choices", "choices": [5, 6]}}
    grid = {"space": choices, "sampler": "grid", "trials": ...}
    start = MadeUp(lambda s: {"val_bits_per_byte": 1.0})
    kills_one = lambda *job: start(*job) if "seed=5" in job[0] else Process(-9)  # noqa: E731
    make(Search(asked(tmp_path, **grid)), kills_one)
    assert len(start.started) == 1
    search = Search(asked(tmp_path, **grid))
    make(search, start)
    assert [settings["seed"] for settings in start.started] == [5, 6]
    (study,) = search.studies
    assert len(points_of(study)[0].runs) == 2
    assert without_result(study).failed == 0


def test_an_objective_that_no_run_knows_ends_the_search_with_the_first(tmp_path: Path) -> None:
    start = MadeUp(lambda s: {"val_bits_per_byte": 1.0, "usd_total": None})
    search = Search(asked(tmp_path, trials=9, objectives=["val_bits_per_byte", "usd_total"]))
    with pytest.raises(UserError, match=r"usd_total is not known of it, .*give hardware\.price_usd_per_hour=…"):
        make(search, start)
    assert len(start.started) == 1


def test_another_space_under_the_same_name_is_refused(tmp_path: Path) -> None:
    make(Search(asked(tmp_path, trials=1)), MadeUp(valley))
    with pytest.raises(UserError, match=r"was begun without seed=\"3\": restore it, or give another out="):
        Search(asked(tmp_path, trials=1, given=("seed=3",)))
    wider = {"optimizer.lr": {"kind": "float", "low": 0.001, "high": 1.0, "log": True}}
    with pytest.raises(UserError, match=r"was begun with space\.optimizer\.lr\.high=0\.1, not 1\.0"):
        Search(asked(tmp_path, trials=1, space=wider))
    Search(asked(tmp_path, trials=7, question="Better said."))


def test_a_corrupt_or_locked_file_is_one_line_with_the_remedy(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(storage, "LOCKED_SECONDS", 0.1)
    (tmp_path / "out").mkdir()
    file = tmp_path / "out/study.db"
    file.write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match=r"study\.db is no readable study .*file is not a database.*move it away"):
        Search(asked(tmp_path))
    assert file.read_bytes().startswith(b"no database")
    file.unlink()
    search = Search(asked(tmp_path, trials=2))
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError, match=r"study\.db is locked by another process: let it end, then give the same"):
        Search(asked(tmp_path, trials=2))
    with pytest.raises(UserError, match="is locked by another process"):
        make(search, MadeUp(valley))
    other.execute("ROLLBACK")
    start = MadeUp(valley)
    make(Search(asked(tmp_path, trials=2)), start)
    assert len(start.started) == 2


def test_a_lost_study_costs_no_run_that_is_there(tmp_path: Path) -> None:
    start = MadeUp(valley)
    make(Search(asked(tmp_path, trials=2)), start)
    (tmp_path / "out/study.db").unlink()
    search = Search(asked(tmp_path, trials=2))
    make(search, start)
    assert len(start.started) == 2  # the sampler suggests the same, and the runs are found by their hash
    assert len(points_of(search.studies[0])) == 2


def test_optuna_itself_can_read_the_study(tmp_path: Path) -> None:
    make(Search(asked(tmp_path, trials=2)), MadeUp(valley))
    study = optuna.load_study(study_name="mine", storage=f"sqlite:///{tmp_path}/out/study.db")
    assert study.best_value == min(trial.value for trial in study.trials)


def test_a_full_disk_is_one_line_without_the_statement_that_met_it(tmp_path: Path) -> None:
    met = sqlite3.OperationalError("database or disk is full")
    with (
        pytest.raises(UserError, match=r"study.db cannot be written \(.*disk is full\): free some space") as raised,
        storage.said(tmp_path / "study.db"),
    ):
        raise OperationalError("INSERT INTO trials", {}, met)
    assert "INSERT" not in str(raised.value)
