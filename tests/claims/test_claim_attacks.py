"""Suites that are tampered with, cut short or asked for nonsense: said in one line, and no verdict rests on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import ROOT
from made_up_claims import HERE, PRICE, TWO_ARMS, MadeUpRuns
from rich.console import Console

from moe_train.claims import html, markdown, record, report, suite
from moe_train.claims.plan import PlannedRun
from moe_train.claims.suite import Asked
from moe_train.claims.verdict import Judged
from moe_train.cost.ledger import read_account
from moe_train.errors import UserError

Make = Callable[..., Any]


def better(run: PlannedRun) -> float:
    return 2.0 + 0.1 * run.seed - (0.05 if run.arm == "two" else 0.0)


def judged(asked: Asked, made: MadeUpRuns, **changes: Any) -> Judged:
    settings: dict[str, Any] = {"device": HERE, "console": Console(quiet=True)} | changes
    (found,) = suite.reproduce(asked, start=made, **settings)
    return found


@pytest.fixture
def finished(asked: Make, claim_dir: Make) -> tuple[Asked, MadeUpRuns]:
    """A suite that was made and judged."""
    claim_dir()
    made = MadeUpRuns(asked().plans(), better)
    assert judged(asked(), made).verdict == "supported"
    return asked(), made


def edit(made: MadeUpRuns, asked: Asked, file: str = "summary.json", index: int = -1, **changes: Any) -> Path:
    path = asked.out / "runs" / made.started[index].hash / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"val_loss": 1.0}, "arm two ended at 2.15 by its curve and at 1.0 by its summary"),
        ({"tokens": 25600}, "arm two trained on 25,600 tokens, not 2,560"),
        ({"seed": 7}, "arm two has seed 7, not 2"),
        ({"config_hash": "0" * 12}, "arm two was trained with another configuration"),
        ({"corpus_fingerprint": "f"}, "was trained on other text"),
        ({"val_complete": False}, "arm two was not evaluated to the end"),
        ({"compute_dtype": "bfloat16"}, "was computed in another format"),
        ({"versions": {"moe_train": "1", "torch": "0"}}, "was made with another version"),
        ({"cost_basis": "owned"}, "was charged in another way"),
    ],
    ids=str,
)
def test_a_summary_that_was_edited_is_no_result(
    changes: dict[str, Any], says: str, finished: tuple[Asked, MadeUpRuns]
) -> None:
    asked, made = finished
    edit(made, asked, **changes)
    found = judged(asked, made)
    assert (found.verdict, found.main.effect) == ("inconclusive", None)
    assert any(says in reason for reason in found.reasons), found.reasons
    assert "Not looked at" in (asked.out / report.MARKDOWN).read_text()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"val_loss": float("nan")}, "has val_loss=nan"),
        ({"val_loss": "low"}, "has val_loss='low'"),
        ({"versions": None}, "has versions=None"),
        ({"tokens": 2560.5}, "has tokens=2560.5"),
        ({"train_seconds": 0.0}, "has train_seconds=0.0"),
    ],
    ids=str,
)
def test_a_summary_no_run_would_write_is_no_result(
    changes: dict[str, Any], says: str, finished: tuple[Asked, MadeUpRuns], capsys: pytest.CaptureFixture[str]
) -> None:
    asked, made = finished
    edit(made, asked, **changes)
    said = f"runs/{made.started[-1].hash}/summary.json {says}: remove the folder, and the run is made again"
    found = judged(asked, made)
    assert (found.verdict, found.main.effect) == ("inconclusive", None)
    assert found.reasons == ["5 of 6 planned runs are there: nothing is computed before all are", said]
    assert f"note: {said}\n" in capsys.readouterr().err  # before other runs take hours


ROW = '{"step": 1, "throughput/step_seconds": 1'


@pytest.mark.parametrize(
    "content",
    [
        *("", "[1]\n", '{"step": 1}\n', "\x00", '{"throughput/step_seconds": 1}\n'),
        *(f'{ROW}, "val/loss": "low"}}\n', f'{ROW}, "progress/tokens": [1]}}\n', f"{ROW}}}\n{ROW}"),
    ],
)
def test_a_curve_no_run_would_write_is_no_result(content: str, finished: tuple[Asked, MadeUpRuns]) -> None:
    asked, made = finished
    (asked.out / "runs" / made.started[0].hash / "metrics.jsonl").write_text(content)
    _, said = judged(asked, made).reasons
    assert said.startswith(f"runs/{made.started[0].hash}/metrics.jsonl ")
    assert said.endswith(": remove the folder, and the run is made again")


@pytest.mark.parametrize("file", ["summary.json", "metrics.jsonl", "ledger.json", "config.yaml"])
@pytest.mark.parametrize("tuning", [None, {"factors": [0.5, 1.0], "tokens": 1280}], ids=["", "tuned"])
def test_a_damaged_run_keeps_its_own_claim_alone_from_being_judged(
    file: str, tuning: dict[str, Any] | None, asked: Make, claim_dir: Make
) -> None:
    scale = TWO_ARMS["scales"]["cpu"]
    claim_dir(scales={"cpu": scale | {"tuning": tuning}})
    claim_dir("other", scales={"cpu": scale | {"first_seed": 50}})
    both = asked("mine,other")
    made = MadeUpRuns(both.plans(), lambda run: better(run) + abs(run.rate / 0.003 - 1))
    everything: dict[str, Any] = {"device": HERE, "console": Console(quiet=True)}
    suite.reproduce(both, start=made, **everything)
    broken = both.out / "runs" / made.started[0].hash
    (broken / file).write_text('{"status": "finished"' + ("}" if file == "summary.json" else ""))
    mine, other = suite.reproduce(both, start=made, **everything)
    assert other.verdict == "supported"
    assert (mine.verdict, mine.main.effect) == ("inconclusive", None)
    assert any(broken.name in reason and "remove the folder, and the run is made" in reason for reason in mine.reasons)
    shutil.rmtree(broken)
    mine, other = suite.reproduce(both, start=made, **everything)
    assert (mine.verdict, other.verdict) == ("supported", "supported")
    assert made.started[-1].hash == broken.name


def test_a_run_without_its_configuration_is_not_taken_at_its_word(finished: tuple[Asked, MadeUpRuns]) -> None:
    asked, made = finished
    (asked.out / "runs" / made.started[0].hash / "config.yaml").unlink()
    assert any("is not there to be checked" in reason for reason in judged(asked, made).reasons)


def test_a_tuning_run_that_was_not_as_planned_spoils_the_rates(asked: Make, claim_dir: Make) -> None:
    tuning = {"factors": [0.5, 1.0], "tokens": 1280}
    claim_dir(scales={"cpu": TWO_ARMS["scales"]["cpu"] | {"tuning": tuning}})
    (plan,) = asked().plans()
    made = MadeUpRuns([plan], lambda run: better(run) + 0.1 * abs(run.rate / plan.arms[run.arm].rate - 1))
    assert judged(asked(), made).verdict == "supported"
    edit(made, asked(), index=0, tokens=640)
    found = judged(asked(), made)
    assert found.verdict == "inconclusive"
    assert any("arm one trained on 640 tokens, not 1,280" in reason for reason in found.reasons)


def test_a_run_that_was_removed_is_made_again(finished: tuple[Asked, MadeUpRuns]) -> None:
    asked, made = finished
    (asked.out / "runs" / made.started[2].hash / "summary.json").write_text('{"status": "fini')  # cut short by a kill
    assert judged(asked, made).verdict == "supported"
    assert made.started[-1].hash == made.started[2].hash


@pytest.mark.parametrize(
    "other", [{"price_usd_per_hour": 2 * PRICE, "device_name": "another"}, {"cpu_kernels": "compiled"}], ids=str
)
def test_a_price_or_kernels_that_changed_between_runs_leave_losses_alone(
    other: dict[str, Any], finished: tuple[Asked, MadeUpRuns]
) -> None:
    asked, made = finished
    edit(made, asked, **other)
    found = judged(asked, made)
    assert found.verdict == "supported"
    assert found.axes[0].axes["usd"] is None
    assert any("seconds and dollars are not compared" in note for note in found.notes)


@pytest.mark.parametrize("content", ["", '{"claims": [', "[]"])
def test_a_damaged_report_is_said_before_anything_is_trained(content: str, asked: Make, claim_dir: Make) -> None:
    claim_dir()
    asked().out.mkdir()
    (asked().out / "report.json").write_text(content)
    made = MadeUpRuns(asked().plans(), better)
    with pytest.raises(UserError, match="is no report of claims: move it away"):
        judged(asked(), made)
    assert not made.started


def test_a_kill_while_the_report_is_written_leaves_the_one_before(
    finished: tuple[Asked, MadeUpRuns], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, made = finished
    before = {name: (asked.out / name).read_text() for name in (record.JSON, report.MARKDOWN, report.HTML)}

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        judged(asked, made)
    assert {name: (asked.out / name).read_text() for name in before} == before


def test_an_out_folder_that_cannot_be_written_is_refused_before_training(asked: Make, claim_dir: Make) -> None:
    claim_dir()
    made = MadeUpRuns(asked().plans(), better)
    asked().out.write_text("a file")
    for attempt in (lambda: judged(asked(), made), lambda: suite.foretell(asked(), None, lambda *_: {})):
        with pytest.raises(UserError, match=r"out=.*out cannot be written \(.*\): choose another folder"):
            attempt()
    assert not made.started


def test_runs_older_than_the_protocol_are_said(finished: tuple[Asked, MadeUpRuns]) -> None:
    asked, made = finished
    assert not any("older than the protocol" in note for note in judged(asked, made).notes)
    (asked.out / "registered/mine-cpu.json").unlink()  # and a margin chosen by what came out
    moment = read_account(asked.out / "runs" / made.started[0].hash / "ledger.json")[0].started_at
    found = judged(asked, made)
    registered = record.read(asked.out / record.JSON)["claims"][0]["registered"]
    assert datetime.fromisoformat(moment) < datetime.fromisoformat(registered)
    assert any("6 of the runs are older than the protocol" in note for note in found.notes)


@pytest.mark.parametrize("damage", [{"usd": None}, {"verdict": "wonderful"}])
def test_a_report_that_was_damaged_is_no_report(
    finished: tuple[Asked, MadeUpRuns], damage: dict[str, str | None]
) -> None:
    file = finished[0].out / record.JSON
    content = json.loads(file.read_text())
    for key, value in damage.items():
        if value is None:
            del content["claims"][0][key]
        else:
            content["claims"][0][key] = value
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"report\.json is no report of claims: move it away, or give another report="):
        record.read(file)


def edited(file: Path, change: Callable[[dict[str, Any]], None], digest: bool = True) -> None:
    content = json.loads(file.read_text())
    change(content)
    for claim in content["claims"] if not digest else []:
        del claim["digest"]
    file.write_text(json.dumps(content))


def test_a_report_that_was_edited_is_not_taken(finished: tuple[Asked, MadeUpRuns], tmp_path: Path) -> None:
    """Far from its runs, nothing else tells."""
    written = (finished[0].out / record.JSON).read_text()
    file = tmp_path / "copy.json"
    file.write_text(json.dumps(json.loads(written)))  # indented in another way
    assert record.read(file)["claims"][0]["verdict"] == "supported"

    def curve(content: dict[str, Any]) -> None:
        content["claims"][0]["curves"]["two"]["loss"]["mean"][3] -= 0.1

    def effect(content: dict[str, Any]) -> None:
        content["claims"][0]["comparisons"][0]["effect"] *= 2

    def verdict(content: dict[str, Any]) -> None:
        content["claims"][0]["verdict"] = "refuted"

    def both_verdicts(content: dict[str, Any]) -> None:
        verdict(content)
        content["claims"][0]["comparisons"][0]["verdict"] = "refuted"

    for change, digest in ((curve, True), (effect, True), (verdict, True), (verdict, False), (both_verdicts, False)):
        file.write_text(written)
        edited(file, change, digest)
        with pytest.raises(UserError, match=r"copy\.json: claim=mine scale=cpu is not as it was written: put the file"):
            record.read(file)
    file.write_text(json.dumps(json.loads(written) | {"date": "2026-11-28"}))
    edited(file, effect, digest=False)  # by then every entry has one
    with pytest.raises(UserError, match=r"copy\.json: claim=mine scale=cpu is not as it was written"):
        record.read(file)
    for total in ("distinct_runs", "usd_of_distinct_runs"):
        file.write_text(written)
        edited(file, lambda content, total=total: content.update({total: 1}))
        with pytest.raises(UserError, match=r"what is said of all claims together is not as it was written"):
            record.read(file)


@pytest.mark.parametrize("file", sorted((ROOT / "docs/results/claims").glob("*.json")), ids=lambda file: file.stem)
def test_what_was_published_follows_from_its_figures(file: Path) -> None:
    assert record.read(file)["claims"]


def test_a_readme_keeps_the_ends_of_its_lines_and_has_one_place_for_the_tables(
    finished: tuple[Asked, MadeUpRuns], tmp_path: Path
) -> None:
    contents = {"report.json": record.read(finished[0].out / record.JSON)}
    readme = tmp_path / "README.md"
    readme.write_bytes(f"Before.\r\n{markdown.BEGIN}\r\n{markdown.END}\r\nAfter.\r\n".encode())
    markdown.write_readme(readme, contents)
    written = readme.read_bytes()
    assert b"**Claims put to the test**" in written
    assert written.count(b"\n") == written.count(b"\r\n")
    readme.write_bytes(2 * written)
    with pytest.raises(UserError, match="has no place for it, or several"):
        markdown.write_readme(readme, contents)


def test_a_readme_that_cannot_be_written_is_as_it_was(
    finished: tuple[Asked, MadeUpRuns], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {"report.json": record.read(finished[0].out / record.JSON)}
    readme, before = tmp_path / "README.md", f"é{markdown.BEGIN}\n{markdown.END}\nAfter.\n"
    readme.write_text(before, encoding="utf-8")
    write = Path.write_text

    def half(path: Path, text: str, **settings: Any) -> int:
        write(path, text[: len(text) // 2], **settings)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", half)
        with pytest.raises(UserError, match=r"No space left.*: it is as it was"):
            markdown.write_readme(readme, contents)
    assert readme.read_text(encoding="utf-8") == before
    assert [path.name for path in tmp_path.glob("*README*")] == ["README.md"]
    link = tmp_path / "link.md"
    link.symlink_to(readme)
    readme.chmod(0o640)
    markdown.write_readme(link, contents)
    assert link.is_symlink()
    assert "Claims put to the test" in readme.read_text(encoding="utf-8")
    assert readme.stat().st_mode & 0o777 == 0o640
    readme.write_bytes(before.encode("latin-1"))
    with pytest.raises(UserError, match="is no text in UTF-8"):
        markdown.write_readme(readme, contents)


def test_the_latest_suite_is_the_one_registered_last_and_none_counts_twice(
    finished: tuple[Asked, MadeUpRuns],
) -> None:
    content = record.read(finished[0].out / record.JSON)
    (claim,) = content["claims"]
    later = claim | {"registered": "2099-01-01T00:00:00+00:00", "first_seed": 0, "run_list": []}
    earlier = claim | {"registered": "2020-01-01T00:00:00+00:00", "first_seed": 500, "run_list": []}
    reports = {"a.json": content | {"claims": [later]}, "b.json": content | {"claims": [earlier]}}
    (row,) = [line for line in markdown.readme_section(reports).splitlines() if line.startswith("| mine")]
    assert "[2099-01-01](a.json)" in row
    assert "(b.json)" in row.split(" | ")[-1]
    record.refuse_twice({"one.json": content})
    with pytest.raises(UserError, match=r"one\.json and copy\.json hold the same suite of claim=mine"):
        record.refuse_twice({"one.json": content, "copy.json": content})


def test_a_run_whose_ledger_is_gone_is_no_run(finished: tuple[Asked, MadeUpRuns]) -> None:
    asked, made = finished
    (asked.out / "runs" / made.started[0].hash / "ledger.json").unlink()
    found = judged(asked, made)
    assert found.verdict == "inconclusive"
    assert any("its ledger.json is not there: remove the folder" in reason for reason in found.reasons)


def test_a_protocol_that_was_damaged_is_refused(finished: tuple[Asked, MadeUpRuns]) -> None:
    asked, _ = finished
    (asked.out / "registered/mine-cpu.json").write_text("{")
    with pytest.raises(UserError, match=r"mine-cpu\.json cannot be read: put it back"):
        asked.plans()


def test_markup_in_a_claim_stays_text(asked: Make, claim_dir: Make) -> None:
    nasty = "# <script>alert(1)</script> | [x](javascript:alert(1)) **bold <!-- /claims -->"
    claim_dir(statement=nasty, published=nasty, carries_over="- " + nasty)
    judged(asked(), MadeUpRuns(asked().plans(), better))
    page = (asked().out / report.HTML).read_text()
    assert "<script" not in page
    assert 'href="javascript' not in page
    assert page.count("<h1>") == 1
    assert page.count("<h2>") == 1
    table = (asked().out / report.MARKDOWN).read_text().split("\n## ")[0]
    assert {line.count("|") for line in table.splitlines() if line.startswith("|")} == {8}


def test_a_report_of_an_earlier_version_is_shown_with_what_it_has(finished: tuple[Asked, MadeUpRuns]) -> None:
    asked, _ = finished
    content = record.read(asked.out / record.JSON)
    for claim in content["claims"]:
        del claim["fits"], claim["common"], claim["tuning"]
        for arm in claim["arms"].values():
            del arm["starts_from"], arm["flops_of"]
        for comparison in claim["comparisons"]:
            del comparison["paired"]
    assert "mine (cpu): supported" in html.report(content)
    for claim in content["claims"]:
        claim["tuning"] = {"factors": [0.5, 1.0], "tokens": 1280, "seeds": 1}  # before arms could be tuned together
    assert "every arm's rate ×0.5, ×1 the best after 1,280 tokens" in markdown.report(content)


def test_a_key_that_is_there_twice_is_refused(asked: Make, claim_dir: Make) -> None:
    """YAML would keep the last margin and say nothing."""
    path = claim_dir() / "claim/mine.yaml"
    path.write_text(path.read_text() + "sigma: 0.1\n")
    with pytest.raises(UserError, match=r"mine\.yaml is no YAML \(sigma is there twice"):
        asked().plans()
    path.write_text(yaml.safe_dump(TWO_ARMS).replace("  two:", "  one:"))
    with pytest.raises(UserError, match=r"one is there twice"):
        asked().plans()
