"""Run folders are found and read whole, half-written or broken, and nothing that could not be read is passed over."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from made_up_runs import write_run

from moe_train.dashboard.content import Source
from moe_train.dashboard.curves import evenly, points_each, short, thinned
from moe_train.dashboard.folders import find_run_folders
from moe_train.dashboard.page import as_json
from moe_train.dashboard.runs import Unreadable, read_run


def content_of(folder: Path, pattern: str | None = None) -> dict:
    return Source(pattern or f"{folder}/**", folder / "ledger.jsonl", folder / "claims/report.json").read()


def test_runs_are_found_at_and_below_what_the_glob_matches_and_not_inside_a_run(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "day/one"), write_run(tmp_path / "two [odd]")
    write_run(two / "wandb/files")  # looks like one, as wandb's own files may
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/config.yaml").write_text("model: nano\n")
    for of_claims in ("registered", "verdicts/a-smoke"):
        (tmp_path / "claims" / of_claims).mkdir(parents=True)
    (tmp_path / "claims/verdicts/a-smoke/metrics.jsonl").write_text("{}\n")  # of a verdict
    for pattern in (f"{tmp_path}/**", f"{tmp_path}", f"{tmp_path}/", f"{tmp_path}/*"):
        assert find_run_folders(pattern) == [one, two], pattern
    assert find_run_folders(f"{tmp_path}/day/*") == [one]
    assert find_run_folders(str(two)) == [two]
    assert find_run_folders(f"{tmp_path}/nothing/**") == []


def test_a_run_that_has_ended_has_the_figures_of_its_summary(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", summary={"val_bits_per_byte": 1.5, "usd_total": 0.25})
    (run,) = content_of(tmp_path)["runs"]
    summary = json.loads((folder / "summary.json").read_text())
    figures = run["figures"]
    assert (figures["val_bits_per_byte"], figures["usd"]) == (1.5, 0.25)
    assert figures["bits_per_byte_a_dollar"] == pytest.approx((8 - 1.5) / 0.25)
    assert figures["tokens_per_second"] == summary["tokens_per_second"]
    assert figures["flops"] == summary["tokens"] * summary["flops_per_token"]
    assert (run["precision"], run["experts"], run["hardware"]) == ("bf16", 16, "cpu, 2 cores")
    assert run["notes"] == []


def test_a_run_that_goes_on_has_the_figures_of_its_last_row_and_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "run", status="running", steps=10)
    (run,) = content_of(tmp_path)["runs"]
    assert run["status"] == "running"
    assert run["figures"]["tokens"] == 10_000
    assert run["figures"]["usd_per_million_tokens_all_in"] is None
    assert "figures are those of the last logged step" in run["notes"]


def test_a_summary_from_before_the_run_went_on_is_not_its_last_word(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=10, status="interrupted")
    assert read_run(folder).status == "interrupted"
    account = json.loads((folder / "ledger.json").read_text())
    now = datetime.now(UTC)
    account["attempts"].append(account["attempts"][0] | {"id": "2", "status": "running", "updated_at": now.isoformat()})
    (folder / "ledger.json").write_text(json.dumps(account))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "train/loss": 1.5, "progress/tokens": 11000}\n')
    run = read_run(folder)
    assert (run.status, run.figure("tokens", "progress/tokens")) == ("running", 11_000)
    account["attempts"][1]["updated_at"] = (now - timedelta(minutes=2)).isoformat()
    (folder / "ledger.json").write_text(json.dumps(account))
    assert read_run(folder).status == "killed"


def test_automatic_precision_is_shown_as_what_it_came_to_and_dense_models_as_such(tmp_path: Path) -> None:
    write_run(tmp_path / "run", precision="auto", num_experts=None)
    (run,) = content_of(tmp_path)["runs"]
    assert (run["precision"], run["experts"], run["load"]) == ("bf16", "dense", None)


def test_broken_lines_are_counted_and_the_others_kept(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=5)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo\n[1]\n{"no step": 1}\n')
        file.write(
            '{"step": 7, "train/loss": NaN, "progress/tokens": "many"}\n{"step": 8, "tr'
        )  # and one being written
    run = read_run(folder)
    assert [row["step"] for row in run.rows] == [1, 2, 3, 4, 5, 7]
    assert run.notes == ["3 lines of metrics.jsonl cannot be read"]
    assert run.last("train/loss") == 2.0
    assert run.last("progress/tokens") == 5000


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("config.yaml", None, "config.yaml is missing"),
        ("config.yaml", "a: [", "config.yaml cannot be read"),
        ("config.yaml", "", "config.yaml is no configuration of a run"),
        ("config.yaml", "- a\n", "config.yaml is no configuration of a run"),
        ("config.yaml", "a: &a {b: *a}\n", "config.yaml cannot be read"),
        ("config.yaml", "a: &a [*a]\n", "config.yaml cannot be read"),
    ],
    ids=str,
)
def test_a_folder_without_a_configuration_is_left_out_with_its_reason(
    file: str, text: str | None, reason: str, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "broken")
    write_run(tmp_path / "whole")
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    content = content_of(tmp_path)
    assert [run["folder"] for run in content["runs"]] == ["whole"]
    assert content["left_out"] == [{"reason": reason, "count": 1, "folders": ["broken"]}]


def test_a_run_that_has_not_logged_a_step_is_left_out_for_now(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", status="running")
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(Unreadable, match="no step is logged yet"):
        read_run(folder)


@pytest.mark.parametrize(
    ("file", "text", "note"),
    [
        ("summary.json", '{"status": "fin', "summary.json cannot be read"),
        ("summary.json", "[]", "summary.json cannot be read"),
        ("ledger.json", '{"attempts": [{"status"', "ledger.json cannot be read"),
        ("metrics.jsonl", None, "metrics.jsonl is missing"),
    ],
    ids=str,
)
def test_what_else_is_broken_in_a_run_is_noted_and_the_rest_shown(
    file: str, text: str | None, note: str, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run")
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    (run,) = content_of(tmp_path)["runs"]
    assert note in run["notes"]
    assert run["figures"]["train_loss"] == pytest.approx(2.0)


@pytest.mark.parametrize("size", [10**400, -(10**400), 1e308, -1e308, 1e-320], ids=lambda size: f"{str(size)[:6]}")
def test_figures_of_no_sensible_size_leave_the_page_whole(size: float, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    metrics = (folder / "metrics.jsonl").read_text()
    for name in ("val_bits_per_byte", "usd_total", "tokens", "flops_per_token"):
        (folder / "summary.json").write_text(json.dumps({**summary, name: size}))
        row = {**json.loads(metrics.splitlines()[-1]), "train/loss": size, "progress/flops": None}
        (folder / "metrics.jsonl").write_text(metrics + json.dumps(row) + "\n")
        content = content_of(tmp_path)
        assert as_json(content)
        assert len(content["runs"]) == 1


def test_a_run_of_an_older_version_has_no_figures_that_it_did_not_log(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", summary={})
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / "summary.json").write_text('{"status": "finished"}')
    (folder / "metrics.jsonl").write_text('{"step": 1, "train/loss": 3.0}\n')
    (folder / "ledger.json").unlink()
    (run,) = content_of(tmp_path)["runs"]
    assert (
        run["figures"]["val_bits_per_byte"] is run["figures"]["usd"] is run["figures"]["bits_per_byte_a_dollar"] is None
    )
    assert run["precision"] is run["experts"] is run["hardware"] is None
    assert run["curves"] == {"train_loss": {"steps": [1], "y": [3]}}


def test_a_run_without_a_price_has_no_dollars_and_says_why(tmp_path: Path) -> None:
    write_run(tmp_path / "run", price=None)
    (run,) = content_of(tmp_path)["runs"]
    assert run["figures"]["usd"] is None
    assert "usd" not in run["curves"]["train_loss"]
    assert "no price: no dollars" in run["notes"]


def test_settings_are_listed_once_with_the_index_of_each_run(tmp_path: Path) -> None:
    for index, lr in enumerate((1e-3, 3e-3, 1e-3)):
        write_run(tmp_path / f"{index}", lr=lr, num_experts=None if index == 2 else 16)
    content = content_of(tmp_path)
    settings = {setting["key"]: (position, setting) for position, setting in enumerate(content["settings"])}
    position, lr = settings["optimizer.lr"]
    assert lr == {"key": "optimizer.lr", "values": ["0.001", "0.003"], "differs": True}
    assert [run["settings"][position] for run in content["runs"]] == [0, 1, 0]
    position, experts = settings["model.moe.num_experts"]
    assert experts["differs"]
    assert [run["settings"][position] for run in content["runs"]] == [0, 0, -1]
    assert not settings["optimizer.betas"][1]["differs"]
    assert settings["optimizer.betas"][1]["values"] == ["[0.9, 0.95]"]


def test_the_load_of_every_layer_is_kept_over_time(tmp_path: Path) -> None:
    write_run(tmp_path / "run", layers=3, steps=200)
    (run,) = content_of(tmp_path)["runs"]
    load = run["load"]
    assert load["layers"] == [0, 1, 2]
    assert load["tokens"][0] == 1000
    assert load["tokens"][-1] == 200_000
    assert load["over_time"]["max_violation"][2][0] == 3.0
    assert load["over_time"]["max_violation"][2][-1] == pytest.approx(3 / 200)
    assert len(load["tokens"]) < 50


def test_long_series_keep_their_ends_and_their_extremes_and_no_other_values() -> None:
    values = [1000.0 - index for index in range(10_000)]
    values[1234], values[6789] = 5000.0, -5000.0
    kept = thinned(values, 300)
    assert len(kept) <= 300
    assert kept[0] == 0
    assert kept[-1] == 9999
    assert {1234, 6789} <= set(kept)
    assert kept == sorted(set(kept))
    assert thinned(values[:300], 300) == list(range(300))


def test_evenly_taken_points_include_both_ends() -> None:
    assert evenly(7, 10) == list(range(7))
    kept = evenly(1000, 10)
    assert (kept[0], kept[-1], len(kept)) == (0, 999, 10)


def test_many_runs_have_fewer_points_each() -> None:
    assert points_each(1) == points_each(100) == 300
    assert points_each(500) == 100
    assert points_each(100_000) == 30


def test_five_digits_are_kept() -> None:
    assert short(2.123456789) == 2.1235
    assert short(1234567.0) == 1234600
    assert short(None) is None


def test_five_hundred_runs_are_read_and_only_the_changed_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(500):
        write_run(tmp_path / f"{index // 50}/{index:03d}", steps=4, seed=index)
    source = Source(f"{tmp_path}/**", tmp_path / "ledger.jsonl", tmp_path / "report.json")
    content = source.read()
    assert len(content["runs"]) == 500
    assert content["spending"]["rows"][-1]["attempts"] == 500
    read = []

    def counted(folder: Path) -> object:
        read.append(folder.name)
        return read_run(folder)

    monkeypatch.setattr("moe_train.dashboard.content.read_run", counted)
    write_run(tmp_path / "3/151", steps=5, seed=151)
    assert len(source.read()["runs"]) == 500
    assert read == ["151"]
