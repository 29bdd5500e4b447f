"""The page in a real Chromium: no network, no error, charts drawn, and what is chosen changes the picture."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import write_run
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from moe_train.claims.record import digest
from moe_train.dashboard.content import Source
from moe_train.dashboard.page import write_page
from moe_train.dashboard.serve import DashboardServer

ROOT = Path(__file__).parents[2]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no Chromium with its chromedriver is installed"),
]
SWITCHES = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1300,1000",
]
NASTY = "<img src=x onerror=alert(1)>&amp;<b>"
CHARTS = ("loss", "usd-a", "speed-a", "usd-b", "speed-b", "layers", "load-over-time", "spent")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=str(DRIVER)))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("made_up")
    kinds = [("bf16", 8), ("fp8_deepseek", 16), ("bf16", 64), ("fp8_rowwise", None)]
    for index, (precision, experts) in enumerate(kinds):
        write_run(
            folder / f"runs/{index}",
            precision=precision,
            num_experts=experts,
            seed=index,
            name=NASTY,
            sweep=NASTY if index % 2 else "sizes",
            lr=1e-3 * (1 + index),
            final_loss=2.0 + 0.1 * index,
            tokens_per_second=1000.0 + 100 * index,
            price=None if index == 3 else 0.05,
            ledger=folder / "ledger.jsonl",
        )
    (folder / "runs/broken").mkdir()
    (folder / "runs/broken/metrics.jsonl").write_text("")
    report = json.loads((ROOT / "docs/results/claims/dollars_gpu.json").read_text())
    claim = report["claims"][0]
    claim["claim"] = NASTY
    claim["digest"] = digest(claim)
    (folder / "report.json").write_text(json.dumps(report))
    return Source(f"{folder}/runs/**", folder / "ledger.jsonl", folder / "report.json")


# As it was when it was loaded: that takes a second, and to draw it anew a tenth.
AS_LOADED = """
    Object.assign(state, {x: "usd", y: "train_loss", logX: false, logY: false, colour: "precision", filters: new Map(),
        selected: null, sort: "bits per byte a dollar", descending: true, search: ""});
    for (const box of document.querySelectorAll("input")) { box.checked = false; box.value = ""; }
    at("x").value = state.x; at("y").value = state.y;
    drawWhole();
"""


@pytest.fixture(scope="module")
def written(source: Source, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("page") / "page.html"
    write_page(file, source.read())
    return file.as_uri()


@pytest.fixture
def page(browser: webdriver.Chrome, written: str) -> webdriver.Chrome:
    if browser.current_url == written:
        browser.execute_script(AS_LOADED)
    else:
        browser.get_log("performance")
        browser.get_log("browser")
        browser.get(written)
    return browser


def chart(browser: webdriver.Chrome, name: str, expression: str) -> Any:
    return browser.execute_script(f"const chart = document.getElementById('{name}'); return {expression}")


def choose(browser: webdriver.Chrome, element: str, value: str) -> None:
    Select(browser.find_element(By.ID, element)).select_by_value(value)


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def text_of(browser: webdriver.Chrome, element: str) -> str:
    return str(chart(browser, element, "chart.textContent"))


def requested(browser: webdriver.Chrome) -> list[str]:
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("data:", "blob:", "chrome"))]  # chrome: its own new tab


def runs_drawn(browser: webdriver.Chrome) -> set[str]:
    return set(chart(browser, "loss", "chart.data.flatMap(trace => trace.customdata.filter(Boolean))"))


def first_cells(browser: webdriver.Chrome) -> list[str]:
    return list(chart(browser, "runs", "[...chart.tBodies[0].rows].map(row => row.cells[0].firstChild.textContent)"))


def test_it_loads_itself_and_nothing_else_without_an_error_and_draws_every_chart(
    browser: webdriver.Chrome, written: str
) -> None:
    browser.get_log("performance")
    browser.get(written)
    page = browser
    assert [url.rpartition("/")[2] for url in requested(page)] == ["page.html"]
    assert page.get_log("browser") == []
    for name in CHARTS:
        assert chart(
            page, name, "chart.querySelectorAll('.trace, .boxes path, .hm image, .heatmaplayer image').length"
        ), name
    assert chart(page, "loss", "chart.data.map(trace => trace.name)") == ["bf16", "fp8_deepseek"]
    assert runs_drawn(page) == {"0", "1", "2"}
    assert "1 have no price, so no place on this axis" in text_of(page, "loss-note")
    assert "1 folder: config.yaml is missing (broken)" in text_of(page, "left-out-list")
    assert chart(page, "usd-a", "chart.layout.xaxis.categoryarray") == ["bf16", "fp8_deepseek"]
    assert chart(page, "speed-b", "chart.layout.xaxis.categoryarray") == ["8", "16", "64", "dense"]


def test_another_axis_changes_the_picture(page: webdriver.Chrome) -> None:
    seen = {}
    for axis, last in (("usd", 40_000 / 1000 / 3600 * 0.05), ("tokens", 40_000), ("flops", 1e11), ("seconds", 40.0)):
        choose(page, "x", axis)
        values = chart(page, "loss", "chart.data[0].x")
        assert values[39] == pytest.approx(last, rel=1e-3)
        seen[axis] = page.find_element(By.ID, "loss").screenshot_as_base64
    assert len(set(seen.values())) == 4
    assert runs_drawn(page) == {"0", "1", "2", "3"}  # one has no price, but all have seconds
    assert chart(page, "loss", "chart.layout.xaxis.type") == "linear"
    for box in ("log-x", "log-y"):
        page.find_element(By.ID, box).click()
    assert chart(page, "loss", "[chart.layout.xaxis.type, chart.layout.yaxis.type]") == ["log", "log"]
    choose(page, "y", "val_bits_per_byte")
    assert chart(page, "loss", "chart.data[0].x.filter(x => x !== null).length") == 8
    assert page.get_log("browser") == []


def test_any_key_of_the_configuration_filters_every_chart_and_the_table(page: webdriver.Chrome) -> None:
    choose(page, "x", "tokens")
    choose(page, "filter-key", "optimizer.lr")
    for value in ("0.002", "0.003"):
        page.find_element(By.CSS_SELECTOR, f"[data-key='optimizer.lr'] input[value='{value}']").click()
    assert runs_drawn(page) == {"1", "2"}
    assert sorted(first_cells(page)) == ["1", "2"]
    assert text_of(page, "shown") == "2 of 4 runs"
    choose(page, "filter-key", "precision")
    page.find_element(By.CSS_SELECTOR, "[data-key='precision'] input[value='bf16']").click()
    assert runs_drawn(page) == {"2"}
    choose(page, "colour", "optimizer.lr")
    assert chart(page, "loss", "chart.data.map(trace => trace.name)") == ["0.003"]
    while buttons := page.find_elements(By.CSS_SELECTOR, ".filter button"):
        buttons[0].click()
    assert len(runs_drawn(page)) == 4


def test_the_table_is_sorted_by_bits_per_byte_a_dollar_and_by_any_column_and_searched(page: webdriver.Chrome) -> None:
    figures = page.execute_script("return content.runs.map(run => [run.folder, run.figures.bits_per_byte_a_dollar])")
    known = sorted((row for row in figures if row[1] is not None), key=lambda row: -row[1])
    assert first_cells(page) == [*(row[0] for row in known), "3"]  # unknown ones last
    for order in (["3", "2", "1", "0"], ["0", "1", "2", "3"]):
        page.find_element(By.XPATH, "//table[@id='runs']//th/button[starts-with(., 'tokens/s')]").click()
        assert first_cells(page) == order
    page.find_element(By.ID, "search").send_keys("fp8 rowwise")
    assert first_cells(page) == ["3"]
    assert text_of(page, "found") == "1 of 4 found"


def test_a_run_that_is_clicked_stands_out_with_its_settings_and_its_own_load(page: webdriver.Chrome) -> None:
    page.find_element(By.XPATH, "//table[@id='runs']/tbody/tr[td[1][starts-with(., '2')]]").click()
    assert chart(page, "loss", "chart.data.at(-1).name") == "<b>2</b>"
    assert chart(page, "load-over-time", "chart.layout.title.text") == "2"
    assert "optimizer.lr0.003" in text_of(page, "selected-settings")


def test_hovering_shows_the_run_and_its_figures(page: webdriver.Chrome) -> None:
    page.execute_script("Plotly.Fx.hover('loss', [{curveNumber: 0, pointNumber: 39}])")
    label = wait_for(lambda: chart(page, "loss", "chart.querySelector('.hoverlayer .hovertext')?.textContent"))
    assert label == "bf160$0.00055562.0000"  # group, run, dollars, loss


def test_names_with_markup_are_shown_as_text(page: webdriver.Chrome) -> None:
    assert page.execute_script("return document.querySelectorAll('img, [onerror]').length") == 0
    assert NASTY in text_of(page, "claims")
    assert NASTY in text_of(page, "ledger")
    assert NASTY in chart(page, "spent", "[...chart.querySelectorAll('.legendtext')].map(each => each.textContent)")
    assert page.get_log("browser") == []


def test_no_button_shares_a_chart_with_a_server(page: webdriver.Chrome) -> None:
    titles = chart(page, "loss", "[...chart.querySelectorAll('.modebar-btn')].map(each => each.dataset.title)")
    assert titles == ["Download plot as a PNG", "Zoom", "Pan", "Reset axes"]


def test_it_is_light_or_dark_as_chosen(page: webdriver.Chrome) -> None:
    colours = []
    for theme in ("light", "dark"):
        Select(page.find_element(By.ID, "theme")).select_by_visible_text(theme)
        body = page.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
        colours.append((body, chart(page, "loss", "chart.layout.font.color")))
    (light, dark_text), (dark, light_text) = colours
    assert (light, dark) == ("rgba(244, 245, 247, 1)", "rgba(17, 20, 24, 1)")
    assert dark_text != light_text


def test_on_a_phone_nothing_is_wider_than_the_screen(page: webdriver.Chrome) -> None:
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        page.refresh()
        assert page.execute_script("return document.documentElement.scrollWidth") == 390
        for name in CHARTS:
            assert 250 < chart(page, name, "chart.querySelector('.main-svg').getBoundingClientRect().width") <= 390
        assert chart(page, "loss", "chart.layout.dragmode") is False  # a finger scrolls the page
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_served_page_shows_a_new_run_without_being_reloaded(browser: webdriver.Chrome, tmp_path: Path) -> None:
    write_run(tmp_path / "one", steps=8)
    server = DashboardServer(Source(f"{tmp_path}/**", tmp_path / "ledger.jsonl", tmp_path / "report.json"), port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        browser.get_log("performance")
        browser.get(server.url)
        choose(browser, "x", "steps")
        write_run(tmp_path / "two", steps=8)
        browser.execute_script("refresh()")
        wait_for(lambda: runs_drawn(browser) == {"one", "two"})
        assert chart(browser, "loss", "chart.layout.xaxis.title.text") == "steps"
        assert set(requested(browser)) == {server.url, f"{server.url}data.json"}
    finally:
        browser.get("about:blank")
        server.shutdown()
        server.server_close()
        thread.join()
