"""Checkpoints: exact round trips, whole or not there at all, damage and strangers named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_train.errors import UserError
from moe_train.model.transformer import Transformer
from moe_train.training import checkpoints
from moe_train.training.checkpoints import (
    checkpoint_paths,
    load_optimizers,
    load_weights,
    open_checkpoint,
    save_checkpoint,
)

MakeModel = Callable[..., Transformer]


def trained(small_model: MakeModel, seed: int = 0) -> tuple[Transformer, list[torch.optim.Optimizer]]:
    model = small_model(dtype=torch.float32, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer)
    return model, [optimizer]


def step(model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(0, 64, (2, 2, 6), generator=generator)
    optimizer.zero_grad()
    model(tokens, targets).objective.backward()
    optimizer.step()


def test_training_goes_on_bit_for_bit_from_a_checkpoint(small_model: MakeModel, tmp_path: Path) -> None:
    model, optimizers = trained(small_model)
    model.routers()[0].selection_bias += 0.25
    path = save_checkpoint(tmp_path, model, optimizers, {"step": 1}, keep_last=2)
    step(model, optimizers[0])

    other, other_optimizers = trained(small_model, seed=9)
    checkpoint = open_checkpoint(path)
    load_weights(checkpoint, other)
    load_optimizers(checkpoint, other_optimizers)
    step(other, other_optimizers[0])
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_only_the_last_checkpoints_are_kept(small_model: MakeModel, tmp_path: Path) -> None:
    model, optimizers = trained(small_model)
    for n in (5, 10, 100, 20):
        save_checkpoint(tmp_path, model, optimizers, {"step": n}, keep_last=2)
    assert [p.name for p in checkpoint_paths(tmp_path)] == ["step_20", "step_100"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("failing", ["save_file", "flush"])
def test_a_failed_write_leaves_the_old_checkpoint_and_nothing_half_made(
    failing: str, small_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizers = trained(small_model)
    save_checkpoint(tmp_path, model, optimizers, {"step": 1}, keep_last=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(checkpoints, failing, full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, model, optimizers, {"step": 2}, keep_last=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_1"]
    load_weights(open_checkpoint(tmp_path / "checkpoints/step_1"), model)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizers.pt"])
@pytest.mark.parametrize("keep", [0, 10, -1])
def test_a_truncated_file_is_named_with_the_remedy(
    name: str, keep: int, small_model: MakeModel, tmp_path: Path
) -> None:
    model, optimizers = trained(small_model)
    save_checkpoint(tmp_path, model, optimizers, {"step": 1}, keep_last=2)
    path = save_checkpoint(tmp_path, model, optimizers, {"step": 2}, keep_last=2)
    (path / name).write_bytes((path / name).read_bytes()[:keep])
    with pytest.raises(
        UserError, match=rf"damaged \({name} has .* put back a whole copy of it, or remove it, and step_1"
    ):
        open_checkpoint(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"step": 3}'])
def test_a_damaged_state_file_is_an_error_of_one_line(content: str, small_model: MakeModel, tmp_path: Path) -> None:
    model, optimizers = trained(small_model)
    path = save_checkpoint(tmp_path, model, optimizers, {"step": 1}, keep_last=1)
    (path / "state.json").write_text(content)
    with pytest.raises(UserError, match="damaged"):
        open_checkpoint(path)


def test_overwritten_contents_of_the_right_size_are_noticed(small_model: MakeModel, tmp_path: Path) -> None:
    model, optimizers = trained(small_model)
    path = save_checkpoint(tmp_path, model, optimizers, {"step": 1}, keep_last=1)
    for name, load in (
        ("model.safetensors", lambda c: load_weights(c, model)),
        ("optimizers.pt", lambda c: load_optimizers(c, optimizers)),
    ):
        (path / name).write_bytes(b"\xff" * (path / name).stat().st_size)
        with pytest.raises(UserError, match="damaged"):
            load(open_checkpoint(path))


def test_a_checkpoint_of_another_model_or_optimizer_is_refused(small_model: MakeModel, tmp_path: Path) -> None:
    model, optimizers = trained(small_model)
    checkpoint = open_checkpoint(save_checkpoint(tmp_path, model, optimizers, {"step": 1}, keep_last=1))
    with pytest.raises(UserError, match=r"another model: blocks\.1\.ffn\.experts\.down_proj is \(8, 32, 16\) there"):
        load_weights(checkpoint, small_model("moe.num_experts=4", dtype=torch.float32))
    with pytest.raises(UserError, match=r"another model: .* is missing from the checkpoint"):
        load_weights(checkpoint, small_model("moe=null", dtype=torch.float32))
    with pytest.raises(UserError, match="another optimizer"):
        load_optimizers(checkpoint, [*optimizers, *optimizers])
    with pytest.raises(UserError, match="another optimizer"):
        load_optimizers(checkpoint, [torch.optim.AdamW([model.embedding.weight])])


def test_nothing_in_a_checkpoint_needs_unpickling_of_code(small_model: MakeModel, tmp_path: Path) -> None:
    model, optimizers = trained(small_model)
    path = save_checkpoint(tmp_path, model, optimizers, {"step": 1}, keep_last=1)
    assert sorted(p.name for p in path.iterdir()) == ["model.safetensors", "optimizers.pt", "state.json"]
    torch.load(path / "optimizers.pt", weights_only=True)
    json.loads((path / "state.json").read_text())
