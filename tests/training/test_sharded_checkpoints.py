"""What keeps a process from writing or reading its shards is said in one line, and leaves nothing half done."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from moe_train.config import ModelConfig
from moe_train.errors import UserError
from moe_train.model.transformer import Transformer
from moe_train.parallel.spread import Whole
from moe_train.training.checkpoints import open_checkpoint, read_weights
from moe_train.training.sharded_checkpoints import Saver, Spreading


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def saver(group: dist.ProcessGroup, small: Transformer, tmp_path: Path) -> Saver:
    return Saver(tmp_path, Spreading(small, Whole(small), []), group, keep_last=2)


@pytest.fixture
def small(model_config: Any) -> Transformer:
    config: ModelConfig = model_config("nano", "num_hidden_layers=1", "hidden_size=16", "moe=null")
    model = Transformer(config, 32, 0.0, False)
    model.initialise(0)
    return model


@pytest.mark.parametrize(
    ("failure", "kind", "said"),
    [
        (
            OSError(errno.ENOSPC, "", "shard"),
            UserError,
            "process 0 could not write its part of step_3: the disk is full",
        ),
        (RuntimeError("gloo: Connection closed by peer"), RuntimeError, "Connection closed by peer"),
    ],
    ids=["disk", "network"],
)
def test_a_shard_that_cannot_be_written_is_no_checkpoint_and_one_line(
    saver: Saver, tmp_path: Path, failure: Exception, kind: type, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise failure

    monkeypatch.setattr(FileSystemWriter, "write_data", failing)
    saver.save({"step": 3})
    with pytest.raises(kind, match=said):
        saver.finish(wait=True)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_shard_that_is_rubbish_is_damage(saver: Saver, small: Transformer, tmp_path: Path) -> None:
    saver.save({"step": 3})
    saver.finish(wait=True)
    checkpoint = open_checkpoint(tmp_path / "checkpoints/step_3")
    name, weight = next(iter(small.named_parameters()))
    assert torch.equal(read_weights(checkpoint)[name], weight)
    (shard,) = (checkpoint.path / "shards").glob("*.distcp")
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UserError, match=r"step_3 is damaged \(shards: Weights only load failed\): put back"):
        read_weights(checkpoint)
