"""Weights from elsewhere as a run at step 0: whole or not there at all, and ready to be trained on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from moe_train.compose import CONFIGS, to_run_config
from moe_train.config import RunConfig
from moe_train.data.tokenizer import bytes_tokenizer
from moe_train.errors import UserError
from moe_train.generation import load_trained
from moe_train.model.transformer import Transformer
from moe_train.training import starting_point
from moe_train.training.checkpoints import load_optimizers
from moe_train.training.run_folder import find_checkpoint
from moe_train.training.starting_point import starting_config, write_starting_point


@pytest.fixture
def made(small_model: Callable[..., Transformer], tmp_path: Path) -> Callable[..., tuple[RunConfig, dict[str, Tensor]]]:
    """A run's configuration and weights for it."""

    def make(name: str = "made", dtype: torch.dtype = torch.float32) -> tuple[RunConfig, dict[str, Tensor]]:
        model = dataclasses.replace(small_model().config, vocab_size=300, name=name)
        built = Transformer(model, 300)
        built.initialise(3)
        config = starting_config(model, tmp_path / "out/tokenizer", sequence_length=100)
        return config, built.to(dtype).state_dict()

    return make


def test_the_weights_are_read_back_as_those_of_a_run(
    made: Callable[..., tuple[RunConfig, dict[str, Tensor]]], tmp_path: Path
) -> None:
    config, weights = made(dtype=torch.bfloat16)
    write_starting_point(tmp_path / "out", config, weights, bytes_tokenizer(), "from nowhere")
    trained = load_trained(tmp_path / "out")
    assert trained.config == config
    assert trained.checkpoint.step == 0
    assert trained.checkpoint.state["origin"] == "from nowhere"
    assert trained.checkpoint.state["corpus_fingerprint"] is None
    state = trained.model.state_dict()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in weights.items())
    assert trained.tokenizer.gives_same_ids_as(bytes_tokenizer())
    load_optimizers(find_checkpoint(tmp_path / "out", "run"), [])


def test_its_configs_make_a_run_that_starts_from_it(
    made: Callable[..., tuple[RunConfig, dict[str, Tensor]]], tmp_path: Path
) -> None:
    config, weights = made()
    command = write_starting_point(tmp_path / "out", config, weights, bytes_tokenizer(), "from nowhere")
    assert command == f"accelerate launch train.py --config-dir {tmp_path}/out/configs experiment=made"
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        search = f"hydra.searchpath=[file://{tmp_path}/out/configs]"
        new = to_run_config(compose("train", overrides=[search, "experiment=made", "name=x"]))
    assert new.model == config.model
    assert new.init_from == str(tmp_path / "out")
    assert new.data.tokenizer == str(tmp_path / "out/tokenizer")
    assert new.data.sequence_length == 100  # the usual 256 are more than the positions there are


@pytest.mark.parametrize(
    ("name", "message"),
    [("a b", "use letters, digits"), ("nano", "is taken by model=nano"), ("laptop_hour", "taken by experiment=")],
)
def test_a_name_that_configs_cannot_hold_is_refused(
    name: str, message: str, made: Callable[..., tuple[RunConfig, dict[str, Tensor]]], tmp_path: Path
) -> None:
    config, weights = made()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, name=name))
    with pytest.raises(UserError, match=message):
        write_starting_point(tmp_path / "out", config, weights, bytes_tokenizer(), "")


def test_a_failure_on_the_way_leaves_nothing(
    made: Callable[..., tuple[RunConfig, dict[str, Tensor]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, weights = made()

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(starting_point, "save_file", full)
    with pytest.raises(OSError, match="disk full"):
        write_starting_point(tmp_path / "out", config, weights, bytes_tokenizer(), "")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_is_left_alone(
    made: Callable[..., tuple[RunConfig, dict[str, Tensor]]], tmp_path: Path
) -> None:
    config, weights = made()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("x")
    with pytest.raises(UserError, match="is not empty: choose another folder"):
        write_starting_point(tmp_path / "out", config, weights, bytes_tokenizer(), "")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file: choose a folder"):
        write_starting_point(tmp_path / "file", config, weights, bytes_tokenizer(), "")
    assert (tmp_path / "out/precious").read_text() == "x"


def test_what_is_written_can_be_read_by_others(
    made: Callable[..., tuple[RunConfig, dict[str, Tensor]]], tmp_path: Path
) -> None:
    config, weights = made()
    write_starting_point(tmp_path / "out", config, weights, bytes_tokenizer(), "")
    reference = tmp_path / "plain"
    reference.write_text(json.dumps({}))
    readable = reference.stat().st_mode & 0o777
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {readable}
