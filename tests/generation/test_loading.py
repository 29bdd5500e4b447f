"""The model of a run folder: its newest checkpoint, and what cannot be loaded or cannot speak."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from moe_train.config import RunConfig, to_dict
from moe_train.data.tokenizer import bytes_tokenizer
from moe_train.errors import UserError
from moe_train.generation import load_for_generation, load_trained
from moe_train.model.transformer import Transformer
from moe_train.training.checkpoints import save_checkpoint

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


def test_a_model_whose_experts_choose_cannot_generate_and_is_told_why(
    tmp_path: Path, compose_run: Callable[..., RunConfig]
) -> None:
    run = saved_run(tmp_path / "run", compose_run, ["model/moe=expert_choice"])
    with pytest.raises(UserError, match=r"expert_choice cannot generate.*later.*another model/moe"):
        load_for_generation(run)


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
