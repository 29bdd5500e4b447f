"""What a run loads before its first step: each of these is half a second to seconds of every start."""

import sys

import pytest
from command_line import Commands

LATE = {
    "torch._dynamo": "torch.compile, which runs do without",
    "torch.distributed.tensor": "tensors that are cut over processes",
    "torch.distributed.fsdp": "what cuts them",
    "torch.distributed.checkpoint": "their checkpoints",
    "sympy": "shapes as formulas",
    "transformers": "other people's models",
    "datasets": "data sets from a hub",
    "wandb": "a tracker that is off",
    "matplotlib": "pictures",
}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_process_loads_nothing_that_its_steps_do_not_use(
    optimizer: str, precision: str, commands: Commands
) -> None:
    run = [f"optimizer={optimizer}", f"precision={precision}", "stop.steps=2", "run_dir=loaded"]
    told = commands._run([sys.executable, "-X", "importtime", *commands.train_command(*run)[1:]])
    assert told.returncode == 0, told.stderr
    loaded = {line.rpartition("|")[2].strip() for line in told.stderr.splitlines() if line.startswith("import time:")}
    assert "torch" in loaded
    assert {name: use for name, use in LATE.items() if name in loaded} == {}
