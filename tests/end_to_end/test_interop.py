"""A trained model goes to transformers and back by the commands, and training goes on from what came back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import ROOT, Commands
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.xdist_group("finished")

PROMPT = "the quick "


@pytest.fixture(scope="module")
def exported(finished: Commands) -> Path:
    finished.run("python", str(ROOT / "scripts/export_hf.py"), "run=run", "out=hf", "json=export.json")
    return finished.folder / "hf"


@pytest.fixture(scope="module")
def imported(finished: Commands, exported: Path) -> str:
    """What the import said."""
    command = ["python", str(ROOT / "scripts/import_hf.py"), f"hf={exported}", "out=again", "name=came_back"]
    return finished.run(*command).stdout


def text_of(commands: Commands, run: str) -> str:
    command = ["python", str(ROOT / "scripts/generate.py"), f"run={run}", f"prompt={PROMPT}", "temperature=0"]
    return commands.run(*command, "max_new_tokens=20").stdout.removesuffix("\n")


@pytest.fixture(scope="module")
def original_text(finished: Commands) -> str:
    return text_of(finished, "run")


def test_transformers_writes_the_text_that_generate_writes(
    finished: Commands, exported: Path, original_text: str
) -> None:
    report = json.loads((finished.folder / "export.json").read_text())
    assert report["num_params"] == finished.summary("run")["total_params"]
    assert report["step"] == 120
    model, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values())
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=20, do_sample=False)[0]
    assert tokenizer.decode(out, skip_special_tokens=True) == original_text


def test_the_card_has_the_figures_of_the_run(finished: Commands, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    summary = finished.summary("run")
    for figure in (f"{summary['val_loss']:.4f}", f"{summary['usd_total']:.4g}", summary["corpus_fingerprint"]):
        assert figure in card


def test_what_comes_back_generates_and_trains_on(finished: Commands, imported: str, original_text: str) -> None:
    assert text_of(finished, "again") == original_text
    assert f"--config-dir {finished.folder}/again/configs experiment=came_back" in imported
    corpus = next(setting for setting in finished.tiny if setting.startswith("data.files="))
    finished.run(
        "python",
        str(ROOT / "train.py"),
        "--config-dir",
        str(finished.folder / "again/configs"),
        "experiment=came_back",
        "run_dir=on",
        "data=text_files",
        corpus,
        "batch_size=4",
        "precision=fp32",
        "num_threads=1",
        "optimizer.lr=1e-6",
        "tracking=none",
        "tracking.log_every_steps=1",
        "stop.steps=2",
        "eval.max_tokens=2000",
    )
    before, after = finished.summary("run"), finished.summary("on")
    assert after["val_loss"] == pytest.approx(before["val_loss"], abs=0.02)
    assert after["total_params"] == before["total_params"]
    assert torch.isfinite(torch.tensor(finished.metrics("on")[0]["train/loss"]))


def test_an_import_with_a_tokenizer_of_an_unreachable_hub_says_what_else_it_takes(
    commands: Commands, exported: Path
) -> None:
    commands.environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    command = ["python", str(ROOT / "scripts/import_hf.py"), f"hf={exported}", "out=other", "tokenizer=org/name"]
    result = commands.run(*command, check=False)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: tokenizer=org/name is no folder here and not in the hub's cache")
    assert line.endswith("or give tokenizer=FOLDER or tokenizer=bytes")


def test_mistakes_are_one_line(finished: Commands) -> None:
    for script, *arguments in (
        ("export_hf", "run=run", "out=other", "family=mixtral"),
        ("import_hf", "hf=run", "out=other"),
    ):
        result = finished.run("python", str(ROOT / f"scripts/{script}.py"), *arguments, check=False)
        assert result.returncode == 1
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert not (finished.folder / "other").exists()
