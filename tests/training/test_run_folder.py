"""Run folders: nothing overwritten, nobody else inside, and a run goes on only as the run it is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_train.config import RunConfig
from moe_train.errors import UserError
from moe_train.training.checkpoints import save_checkpoint
from moe_train.training.run_folder import RunFolder, load_run_config, open_run_folder

Compose = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def opened(config: RunConfig) -> RunFolder:
    folder = open_run_folder(config)
    folder.lock.release()
    return folder


def checkpoint_at(folder: Path, step: int) -> Path:
    return save_checkpoint(folder, torch.nn.Linear(1, 1), [], {"step": step}, keep_last=5)


def test_by_default_runs_get_folders_of_their_own_even_within_a_second(compose_run: Compose) -> None:
    paths = [opened(compose_run()).path for _ in range(3)]
    assert len(set(paths)) == 3
    assert all(
        p.parent.parent == Path("outputs").absolute() and p.name.split("-", 3)[3].startswith("test") for p in paths
    )


def test_the_configuration_is_kept_and_read_back_equal(compose_run: Compose) -> None:
    config = compose_run("model=tiny", "data=text_files", "data.files=[a.txt]", "run_dir=run")
    assert load_run_config(opened(config).path) == config


def test_an_occupied_folder_is_not_written_to(compose_run: Compose) -> None:
    Path("run").mkdir()
    Path("run/thesis.txt").write_text("mine")
    for override in ("resume=null", "resume=auto"):
        with pytest.raises(UserError, match="is not empty"):
            open_run_folder(compose_run("run_dir=run", override))
    assert [p.name for p in Path("run").iterdir() if p.name != ".lock"] == ["thesis.txt"]


def test_resume_auto_starts_a_run_that_is_not_there_and_goes_on_with_one_that_is(compose_run: Compose) -> None:
    config = compose_run("run_dir=run", "resume=auto")
    assert opened(config).checkpoint is None
    checkpoint_at(Path("run"), 5)
    checkpoint_at(Path("run"), 10)
    again = opened(config)
    assert again.checkpoint is not None
    assert again.checkpoint.step == 10
    assert again.checkpoint is not None


@pytest.mark.parametrize("content", ["[", "3", None], ids=["no yaml", "a number", "a folder"])
def test_a_broken_configuration_of_another_run_is_said_and_passed_over(
    content: str | None, compose_run: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    first = opened(compose_run("seed=1"))
    checkpoint_at(first.path, 3)
    broken = Path("outputs/2999-01-01/other/config.yaml")  # looked at first
    broken.parent.mkdir(parents=True)
    broken.mkdir() if content is None else broken.write_text(content)
    assert opened(compose_run("seed=1", "resume=auto")).path == first.path
    assert "other/config.yaml cannot be read" in capsys.readouterr().err


def test_resume_auto_without_a_folder_finds_the_run_by_its_hash(compose_run: Compose) -> None:
    first = opened(compose_run("seed=1"))
    opened(compose_run("seed=2"))
    checkpoint_at(first.path, 3)
    assert opened(compose_run("seed=1", "resume=auto")).path == first.path


def test_other_settings_than_the_runs_are_refused_by_name_but_its_end_may_move(compose_run: Compose) -> None:
    opened(compose_run("run_dir=run", "stop.steps=5"))
    with pytest.raises(UserError, match=r"optimizer\.lr=0\.\d+, not 0\.5"):
        open_run_folder(compose_run("run_dir=run", "resume=auto", "stop.steps=5", "optimizer.lr=0.5"))
    with pytest.raises(UserError, match=r'optimizer\.moments="float32", not "bfloat16": give the settings it was'):
        open_run_folder(compose_run("run_dir=run", "resume=auto", "stop.steps=5", "optimizer.moments=bfloat16"))
    opened(compose_run("run_dir=run", "resume=auto", "stop.steps=9"))
    assert load_run_config(Path("run")).stop.steps == 9
    assert Path("run/config.1.yaml").exists()


def test_a_finished_run_is_not_made_twice(compose_run: Compose) -> None:
    config = compose_run("run_dir=run", "resume=auto")
    folder = opened(config)
    (folder.path / "summary.json").write_text(
        json.dumps({"status": "finished", "steps": 1, "config_hash": config.config_hash()})
    )
    assert opened(config).finished_summary is not None
    assert opened(compose_run("run_dir=run", "resume=auto", "stop.steps=9")).finished_summary is None


def test_resume_path_takes_a_run_or_its_newest_checkpoint(compose_run: Compose) -> None:
    opened(compose_run("run_dir=run"))
    old, new = checkpoint_at(Path("run").absolute(), 5), checkpoint_at(Path("run").absolute(), 10)
    for path in ("run", str(new)):
        folder = opened(compose_run(f"resume={path}"))
        assert folder.checkpoint is not None
        assert folder.checkpoint.step == 10
        assert folder.path == Path("run").absolute()
    with pytest.raises(UserError, match=r"not the newest checkpoint.*init_from="):
        open_run_folder(compose_run(f"resume={old}"))
    with pytest.raises(UserError, match=r"run_dir=.*is another: .*init_from="):
        open_run_folder(compose_run("resume=run", "run_dir=branch"))


def test_init_from_starts_a_new_run_with_other_settings(compose_run: Compose) -> None:
    opened(compose_run("run_dir=run"))
    old = checkpoint_at(Path("run").absolute(), 5)
    checkpoint_at(Path("run").absolute(), 10)
    for source, step in ((str(old), 5), ("run", 10)):
        branch = opened(compose_run(f"init_from={source}", f"run_dir=branch_{step}", "optimizer.lr=0.5"))
        assert branch.checkpoint is None
        assert branch.start is not None
        assert branch.start.step == step
    with pytest.raises(UserError, match=r"init_from=.*there is no such folder"):
        open_run_folder(compose_run("init_from=nowhere", "run_dir=other"))
    assert not Path("other").exists()


@pytest.mark.parametrize("path", ["nowhere", "empty", "empty/checkpoints/step_3"])
def test_resuming_from_nothing_is_an_error_of_one_line(path: str, compose_run: Compose) -> None:
    Path("empty/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"resume=.*there is no|is no checkpoint"):
        open_run_folder(compose_run(f"resume={path}"))


def test_a_folder_in_use_by_another_process_is_refused(compose_run: Compose) -> None:
    opened(compose_run("run_dir=run"))
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import filelock,time; lock = filelock.FileLock('run/.lock'); lock.acquire(); "
            "print('held', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="in use by another process"):
            open_run_folder(compose_run("run_dir=run", "resume=auto"))
    finally:
        holder.kill()
        holder.wait()
    opened(compose_run("run_dir=run", "resume=auto"))


def test_a_run_dir_that_is_a_file_is_refused(compose_run: Compose) -> None:
    Path("file").write_text("x")
    with pytest.raises(UserError, match=r"not empty|is a file"):
        open_run_folder(compose_run("run_dir=file"))


def test_a_folder_in_which_no_run_began_can_be_taken_back(compose_run: Compose) -> None:
    open_run_folder(compose_run("run_dir=run")).discard()
    assert not Path("run").exists()
    opened(compose_run("run_dir=run"))
    open_run_folder(compose_run("run_dir=run", "resume=auto")).discard()
    assert Path("run/config.yaml").exists()


def test_the_format_in_which_tokens_travel_is_part_of_the_run_and_named_as_it_is_set(compose_run: Compose) -> None:
    opened(compose_run("run_dir=run", "parallel=ep"))
    with pytest.raises(UserError, match=r'with parallel\.dispatch_format="compute", not "fp8"'):
        open_run_folder(compose_run("run_dir=run", "resume=auto", "parallel=ep", "parallel.dispatch_format=fp8"))
    opened(compose_run("run_dir=run", "resume=auto", "parallel=fsdp2"))
