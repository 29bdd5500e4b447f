"""The model of a run folder: its newest checkpoint, and what cannot be loaded or cannot speak."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from moe_train.config import RunConfig, model_digest, to_dict
from moe_train.data.tokenizer import bytes_tokenizer
from moe_train.errors import UserError
from moe_train.generation import load_for_generation, load_trained
from moe_train.generation.loading import threads_of
from moe_train.model.transformer import Transformer
from moe_train.training.checkpoints import save_checkpoint
from moe_train.training.run_folder import load_run_config

SMALL = ["model.hidden_size=32", "model.num_hidden_layers=2", "model.moe.num_experts=8", "model.moe.top_k=2"]


def saved_run(
    run: Path, compose_run: Callable[..., RunConfig], overrides: list[str], steps: tuple[int, ...] = (1, 2)
) -> Path:
    """A run folder whose checkpoint of step N has N in its last norm."""
    config = compose_run(*SMALL, *overrides)
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    (run / "tokenizer").mkdir()
    bytes_tokenizer().save(run / "tokenizer")
    model = Transformer(config.model.resolved(), vocab_size=320)
    model.initialise(0)
    for step in steps:
        model.norm.weight.data.fill_(step)
        save_checkpoint(run, model, [], {"step": step, "vocab_size": 320}, keep_last=5)
    return run


@pytest.mark.parametrize("checkpoint", [None, "step_1", "step_2"])
def test_the_newest_checkpoint_is_taken_or_the_one_given(
    tmp_path: Path, compose_run: Callable[..., RunConfig], checkpoint: str | None
) -> None:
    run = saved_run(tmp_path / "run", compose_run, [])
    trained = load_trained(run if checkpoint is None else run / "checkpoints" / checkpoint)
    assert trained.checkpoint.path.name == (checkpoint or "step_2")
    assert trained.model.norm.weight[0] == (1.0 if checkpoint == "step_1" else 2.0)
    assert not trained.model.training


def test_a_model_is_used_on_the_cpu_where_that_is_asked_for_beside_a_gpu(
    tmp_path: Path, compose_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # and whoever takes it fails
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run = saved_run(tmp_path / "run", compose_run, [])
    assert load_trained(run).model.embedding.weight.device.type == "cpu"


def test_weights_are_not_read_as_another_model_than_they_were_trained_as(
    tmp_path: Path, compose_run: Callable[..., RunConfig]
) -> None:
    run = saved_run(tmp_path / "run", compose_run, [])
    state = run / "checkpoints/step_2/state.json"
    digest = model_digest(load_run_config(run).model)
    state.write_text(json.dumps(json.loads(state.read_text()) | {"model_digest": digest}))
    load_trained(run)
    content = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in (("rope_theta", 77.0), ("rms_norm_eps", 1e-5)):
        (run / "config.yaml").write_text(yaml.safe_dump(content | {"model": content["model"] | {key: value}}))
        with pytest.raises(UserError, match="does not describe the model that step_2 was trained as"):
            load_trained(run)


def test_damage_to_the_tokenizer_or_the_state_is_one_line(
    tmp_path: Path, compose_run: Callable[..., RunConfig]
) -> None:
    run = saved_run(tmp_path / "run", compose_run, [])
    state = run / "checkpoints/step_2/state.json"
    whole = state.read_text()
    for damage in ({}, {"vocab_size": "x"}):
        content = {k: v for k, v in json.loads(whole).items() if k != "vocab_size"} | damage
        state.write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"damaged \(state.json has no vocab_size\)"):
            load_trained(run)
    state.write_text(whole)
    (run / "tokenizer/tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"the tokenizer in .* cannot be read"):
        load_trained(run)


def test_a_model_whose_experts_choose_cannot_generate_and_is_told_why(
    tmp_path: Path, compose_run: Callable[..., RunConfig]
) -> None:
    run = saved_run(tmp_path / "run", compose_run, ["model/moe=expert_choice"])
    with pytest.raises(UserError, match=r"expert_choice cannot generate.*later.*another model/moe"):
        load_for_generation(run)


def test_a_run_that_had_more_cores_than_there_are_is_used_with_all(compose_run: Callable[..., RunConfig]) -> None:
    assert threads_of(compose_run("num_threads=1")) == 1
    assert threads_of(compose_run("num_threads=100000")) is None
    assert threads_of(compose_run()) is None


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("nothing", "there is no such folder"),
        ("folder", "give a run folder"),
        ("config", "there is no checkpoint in it"),
    ],
)
def test_a_run_that_cannot_be_loaded_is_one_error_with_a_remedy(
    tmp_path: Path, compose_run: Callable[..., RunConfig], made: str, message: str
) -> None:
    run = tmp_path / "run"
    if made == "folder":
        run.mkdir()
    elif made == "config":
        saved_run(run, compose_run, [], steps=())
    with pytest.raises(UserError, match=message):
        load_trained(run)
