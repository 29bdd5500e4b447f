"""metrics.jsonl through kills and resumes, and wandb as a faithful, quiet and dispensable copy of it."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from moe_train.compose import validated
from moe_train.config import TrackingConfig
from moe_train.errors import UserError
from moe_train.tracking.tracker import Tracker

CONFIGS = Path(__file__).parents[2] / "configs"
API_KEY = "0123456789abcdef" * 3  # of the right form, of nobody


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """Nobody's home, no key, no wish, a server that must not be called; no wandb service left for the next test."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield
        server.setblocking(False)
        with pytest.raises(BlockingIOError):  # no connection waits to be accepted
            server.accept()
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def config(wandb: str) -> TrackingConfig:
    return TrackingConfig(wandb=wandb, project="p", group="g", tags=("a", "b"), notes="n", log_every_steps=1)


def tracker(folder: Path, wandb: str = "off", resume_step: int | None = None) -> Tracker:
    folder.mkdir(exist_ok=True)
    return Tracker(folder, config(wandb), {"model": {"hidden_size": 8}}, "name", "id123", resume_step)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def wandb_records(folder: Path) -> list[dict]:
    """What wandb's own reader finds in an offline run."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    environment = {**os.environ, "WANDB_ERROR_REPORTING": "false"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in output.splitlines()]


def wandb_rows(folder: Path) -> list[dict]:
    found = []
    for record in wandb_records(folder):
        if record["type"] == "history":
            item = {k: v for k, v in record["history"]["item"].items() if not k.startswith("_")}
            found.append({"step": record["history"]["step"]["num"], **item})
    return found


# ------------------------------------------------------------------------------------------------- metrics.jsonl


def test_each_logged_step_is_a_line_at_once_and_what_is_no_number_is_null(tmp_path):
    run = tracker(tmp_path)
    run.log(10, {"train/loss": 3.5, "val/loss": None, "a": math.nan, "b": -math.inf})
    assert rows(tmp_path) == [{"step": 10, "train/loss": 3.5, "val/loss": None, "a": None, "b": None}]
    assert run.wandb_location is None


@pytest.mark.parametrize("step", [10, 9])
def test_a_step_is_logged_once_and_in_order(tmp_path, step):
    run = tracker(tmp_path)
    run.log(10, {"train/loss": 3.5})
    with pytest.raises(ValueError, match="a step is logged once, in order"):
        run.log(step, {"val/loss": 3.5})


def test_the_metrics_of_another_run_are_not_touched(tmp_path):
    tracker(tmp_path).log(1, {"train/loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl .*resume=auto or choose another run_dir"):
        tracker(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_resume_drops_the_rows_beyond_its_checkpoint_so_that_each_step_stands_once(tmp_path):
    first = tracker(tmp_path)
    for step in (10, 20, 30, 40):
        first.log(step, {"train/loss": 1.0})
    second = tracker(tmp_path, resume_step=25)
    for step in (30, 40, 50):
        second.log(step, {"train/loss": 2.0})
    assert [(row["step"], row["train/loss"]) for row in rows(tmp_path)] == [(10, 1), (20, 1), (30, 2), (40, 2), (50, 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resume_into_a_new_folder_begins_a_new_file(tmp_path):
    tracker(tmp_path, resume_step=25).log(30, {"train/loss": 2.0})
    assert [row["step"] for row in rows(tmp_path)] == [30]


def test_half_a_last_line_is_dropped_and_damage_elsewhere_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n{"step": 20}\n{"step": 3')
    tracker(tmp_path, resume_step=30).log(40, {})
    assert [row["step"] for row in rows(tmp_path)] == [10, 20, 40]
    path.write_text('{"step": 10}\n{"ste\n{"step": 30}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is not a row"):
        tracker(tmp_path, resume_step=30)


def test_a_killed_run_leaves_complete_lines_but_perhaps_the_last_and_goes_on(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", _ENDLESS_RUN, str(tmp_path)], env={**os.environ, **_IMPORTABLE})
    try:
        path, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 30
        while not path.exists() or path.read_bytes().count(b"\n") < 200:
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    # Linux ends even a single write where a page ends, if the process is killed there: seen once in hundreds of runs.
    *complete, _ = path.read_bytes().split(b"\n")
    assert [json.loads(line)["step"] for line in complete] == list(range(1, len(complete) + 1))
    assert len(complete) >= 200
    tracker(tmp_path, resume_step=150).log(151, {})
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 152))


_IMPORTABLE = {"PYTHONPATH": str(Path(__file__).parents[2])}
_START = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from moe_train.config import TrackingConfig
    from moe_train.tracking.tracker import Tracker

    def start(wandb):
        config = TrackingConfig(wandb=wandb, project="p", group="g", tags=("a", "b"), notes="n", log_every_steps=1)
        return Tracker(Path(sys.argv[1]), config, {"model": {"hidden_size": 8}}, "name", "id123", None)
    """
)
_ENDLESS_RUN = _START + textwrap.dedent(
    """
    import itertools
    run = start("off")
    for step in itertools.count(1):
        run.log(step, {f"metric/{n}": step / 7 for n in range(30)})
    """
)
_OFFLINE_RUN = _START + textwrap.dedent(
    """
    run = start("auto")
    for step in range(1, 101):
        run.log(step, {"train/loss": 10 / step, "val/loss": None, "bad": float("nan"), "progress/tokens": 64.0 * step})
    run.finish({"status": "finished", "usd_total": None, "versions": {"torch": "2"}})
    """
)

# -------------------------------------------------------------------------------------------------------- wandb


@pytest.fixture
def offline_run(tmp_path):
    """A whole run in its own process, with secrets about: no key of wandb's, so `auto` is offline."""
    folder = tmp_path / "run"
    folder.mkdir()
    secrets = {"HF_TOKEN": "hf_secret_5d41402abc", "AWS_SECRET_ACCESS_KEY": "aws_secret_7d793037a0"}
    environment = {**os.environ, **_IMPORTABLE, **secrets, "WANDB_API_KEY": API_KEY, "WANDB_MODE": "offline"}
    command = [sys.executable, "-c", _OFFLINE_RUN, str(folder), "token=argv_secret_76023a"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return SimpleNamespace(
        folder=folder,
        output=process.stdout + process.stderr,
        secrets=[*secrets.values(), API_KEY, "argv_secret_76023a"],
    )


def test_an_offline_run_holds_the_same_rows_says_nothing_and_keeps_no_secret(offline_run):
    assert offline_run.output == ""
    assert len(rows(offline_run.folder)) == 100
    assert wandb_rows(offline_run.folder) == rows(offline_run.folder)
    files = [path for path in offline_run.folder.rglob("*") if path.is_file()]
    assert len(files) >= 3
    for path in files:
        assert not any(secret.encode() in path.read_bytes() for secret in offline_run.secrets), path

    records = {
        kind: [r[kind] for r in wandb_records(offline_run.folder) if r["type"] == kind] for kind in ("run", "metric")
    }
    (run,) = records["run"]
    assert run["config"]["update"]["model"] == {"hidden_size": 8}
    assert (run["run_id"], run["run_group"], run["tags"], run["notes"]) == ("id123", "g", ["a", "b"], "n")
    axes = {metric.get("name") or metric["glob_name"]: metric.get("step_metric") for metric in records["metric"]}
    assert axes == {
        "progress/tokens": None,
        "progress/flops": None,
        "progress/seconds": None,
        "cost/usd_total": None,
        "train/*": "progress/tokens",
        "val/*": "progress/tokens",
    }


def test_without_a_key_auto_is_offline_and_online_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"tracking\.wandb=online finds no API key"):
        tracker(tmp_path / "online", "online")
    run = tracker(tmp_path / "auto", "auto")
    assert Path(run.wandb_location).parent == tmp_path / "auto" / "wandb"
    assert Path(run.wandb_location).name.startswith("offline-run-")


@pytest.mark.parametrize("source", ["environment", "netrc"])
def test_with_a_key_auto_is_online_and_takes_up_the_same_run(tmp_path, monkeypatch, source):
    calls = fake_wandb_init(monkeypatch, offline=False)
    server = os.environ["WANDB_BASE_URL"].removeprefix("http://")
    if source == "environment":
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    else:
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        (tmp_path / "netrc").write_text(f"machine {server}\n  login user\n  password {API_KEY}\n")
    run = tracker(tmp_path / "run", "auto")
    assert [(call["mode"], call["resume"], call["id"]) for call in calls] == [("online", "allow", "id123")]
    assert run.wandb_location == "https://wandb.invalid/p/runs/id123"


@pytest.mark.parametrize(("asked", "mode"), [("disabled", None), ("offline", "offline"), ("dryrun", "offline")])
def test_auto_honours_wandb_mode_even_with_a_key(tmp_path, monkeypatch, asked, mode):
    calls = fake_wandb_init(monkeypatch, offline=True)
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    monkeypatch.setenv("WANDB_MODE", asked)
    tracker(tmp_path, "auto")
    assert [call["mode"] for call in calls] == ([mode] if mode else [])


def test_what_the_configuration_says_goes_before_wandb_mode(tmp_path, monkeypatch):
    calls = fake_wandb_init(monkeypatch, offline=False)
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker(tmp_path, "online")
    assert [call["mode"] for call in calls] == ["online"]


def test_where_the_network_fails_auto_goes_on_offline_and_online_without_wandb(tmp_path, monkeypatch, capsys):
    calls = fake_wandb_init(monkeypatch, offline=True, unreachable=True)
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    assert tracker(tmp_path / "auto", "auto").wandb_location == "/runs/offline-id123"
    assert [call["mode"] for call in calls] == ["online", "offline"]
    assert "cannot go online (no route to host): logging offline\n" in capsys.readouterr().err
    run = tracker(tmp_path / "online", "online")
    assert capsys.readouterr().err == "warning: wandb failed (no route to host): metrics go on in metrics.jsonl only\n"
    assert run.wandb_location is None
    run.log(1, {})
    assert rows(tmp_path / "online") == [{"step": 1}]


def test_a_wandb_that_dies_is_reported_once_and_the_run_goes_on(tmp_path):
    """In a process of its own: what wandb does at exit counts too."""
    script = _START + textwrap.dedent(
        """
        import os, psutil
        run = start("offline")
        run.log(1, {"train/loss": 1.0})
        for child in psutil.Process().children(recursive=True):
            child.kill()
            child.wait()
        for step in (2, 3, 4):
            run.log(step, {"train/loss": 1.0})
        run.finish({"status": "finished"})
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    process = subprocess.run(
        command, env={**os.environ, **_IMPORTABLE}, capture_output=True, text=True, timeout=60, check=True
    )
    assert process.stderr.count("\n") == 1
    assert process.stderr.startswith("warning: wandb failed (")
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_without_wandb_it_is_not_even_imported(tmp_path):
    script = _START + "start('off').log(1, {}); assert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env={**os.environ, **_IMPORTABLE}, check=True)


@pytest.mark.parametrize(("name", "wandb"), [("wandb", "auto"), ("none", "off")])
def test_every_tracking_on_offer_gives_all_its_keys(name, wandb):
    path = CONFIGS / "tracking" / f"{name}.yaml"
    assert validated(TrackingConfig, OmegaConf.to_container(OmegaConf.load(path)), str(path)).wandb == wandb


def fake_wandb_init(monkeypatch, offline: bool, unreachable: bool = False) -> list[dict]:
    """Stand in for the one call that would use the network; finding the key stays wandb's own."""
    import wandb

    calls: list[dict] = []

    def init(**arguments):
        calls.append(arguments)
        if unreachable and arguments["mode"] == "online":
            raise wandb.errors.CommError("no route\n to host")
        return SimpleNamespace(
            offline=offline,
            url="https://wandb.invalid/p/runs/id123",
            settings=SimpleNamespace(sync_dir="/runs/offline-id123"),
            define_metric=lambda *names, **options: None,
            log=lambda row, **options: None,
        )

    monkeypatch.setattr(wandb, "init", init)
    return calls
