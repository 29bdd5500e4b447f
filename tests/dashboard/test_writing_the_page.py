"""The page holds everything within itself, carries no markup out of the data, and overwrites nothing but itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command_line import ROOT
from made_up_runs import write_run

from moe_train.dashboard.content import Source
from moe_train.dashboard.page import MARKER, as_json, as_page, write_page
from moe_train.errors import UserError

NASTY = '</script><script>alert(1)</script><!-- <b onmouseover="x()">&amp; \u2028 {{plotly}} $1'


class Parts(HTMLParser):
    """Elements by tag with their attributes, and the text of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.scripts and self.elements[-1][0] == "script":
            self.scripts[-1] += data


@pytest.fixture
def content(tmp_path: Path) -> dict:
    write_run(tmp_path / "runs/one", name=NASTY, sweep=NASTY, settings={"note": NASTY})
    return Source(f"{tmp_path}/runs/**", tmp_path / "ledger.jsonl", tmp_path / "report.json").read()


def test_json_in_the_page_can_neither_end_its_element_nor_lose_a_character() -> None:
    text = as_json({NASTY: [NASTY]})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {NASTY: [NASTY]}


def test_a_name_of_broken_characters_is_shown_with_a_sign_in_their_place(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/run").rename(tmp_path / "runs/run\udcff")
    content = Source(f"{tmp_path}/runs/**", tmp_path / "ledger.jsonl", tmp_path / "report.json").read()
    write_page(tmp_path / "page.html", content)
    assert '"folder":"run?"' in (tmp_path / "page.html").read_text()


def test_the_page_refers_to_nothing_outside_itself(content: dict) -> None:
    parts = Parts(as_page(content))
    for tag, attributes in parts.elements:
        assert "src" not in attributes, tag
        assert attributes.get("href", "data:,") == "data:,", tag
    (policy,) = (a["content"] for tag, a in parts.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"https?:", policy)
    assert "{{" not in re.sub(r"<script.*?</script>", "", as_page(content), flags=re.S)


def test_data_plotly_and_our_scripts_are_in_the_page_in_that_order(content: dict) -> None:
    data, plotly, own = Parts(as_page(content)).scripts
    assert json.loads(data) == json.loads(json.dumps(content))
    assert json.loads(data)["runs"][0]["name"] == NASTY
    assert len(plotly) > 1_000_000
    assert "function drawLoss" in own


def test_our_scripts_put_names_on_the_page_as_text_alone() -> None:
    for file in (ROOT / "moe_train/dashboard").glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", file.read_text()
        ), file


def test_our_own_page_may_be_written_again_and_nothing_else(content: dict, tmp_path: Path) -> None:
    page, other = tmp_path / "new/page.html", tmp_path / "other.html"
    assert write_page(page, content) == page.stat().st_size
    write_page(page, content)
    assert page.read_text()[:400].count(MARKER) == 1
    other.write_text("<html>mine</html>")
    with pytest.raises(UserError, match="exists already and is no dashboard: choose another file or remove it"):
        write_page(other, content)
    assert other.read_text() == "<html>mine</html>"
    with pytest.raises(UserError, match="is a folder: give the name of a file in it"):
        write_page(tmp_path, content)
    with pytest.raises(UserError, match="cannot be written"):
        write_page(other / "page.html", content)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "other.html", "runs"}


def dashboard(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/dashboard.py"), *arguments]
    return subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=120, check=False)


def test_the_command_writes_the_page_and_says_what_it_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "outputs/day/one")
    write_run(tmp_path / "outputs/day/two")
    (write_run(tmp_path / "outputs/day/three") / "config.yaml").unlink()
    result = dashboard(tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("2 runs in outputs/dashboard.html (")
    assert result.stderr == "note: 1 left out: config.yaml is missing (three)\n"
    assert (tmp_path / "outputs/dashboard.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (["runs=nothing/**"], "runs=nothing/**: there is no run folder at or below it", 1),
        (["out=mine.txt"], "out=mine.txt exists already and is no dashboard", 1),
        (["serve=true", "out=page.html"], "out= is the file of a page", 2),
        (["port=8000"], "port= is where a page is served: give serve=true", 2),
        (["serve=true", "port=70000"], "port=70000: give a number of at most 65,535", 2),
        (["run=outputs"], "unknown argument run=outputs: did you mean runs=?", 2),
    ],
    ids=str,
)
def test_mistakes_are_one_line(arguments: list[str], message: str, status: int, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = dashboard(tmp_path, *arguments)
    assert result.returncode == status
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
