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


# Forward and backward in one compiled function: its operators run below it.
COMPILED_STEP = """
import sys
import torch
from moe_train.benchmark.arms import TrainingArm
from moe_train.compose import compose_run
from moe_train.training.runtime import start_runtime

arm = TrainingArm(compose_run(sys.argv[1:], "test"), start_runtime(compose_run(sys.argv[1:], "test")))
inputs, targets = arm.batches[0]

def step():
    with torch.autocast("cpu", torch.bfloat16):
        loss = arm.model(inputs, targets).objective
    loss.backward()
    return loss.detach()

def norms(step):
    found = []
    for _ in range(2):
        arm.model.zero_grad()
        found += [step().item(), sum(p.grad.double().square().sum() for p in arm.model.parameters()).item()]
    return found

assert "torch._dynamo" not in sys.modules
plain = norms(step)
assert norms(torch.compile(step, backend="eager")) == plain, plain
"""


def test_a_step_that_somebody_compiles_is_the_step(commands: Commands) -> None:
    settings = ["model=nano", "model.num_hidden_layers=2", "batch_size=4", "data.sequence_length=16", "precision=bf16"]
    told = commands._run([sys.executable, "-c", COMPILED_STEP, *settings])
    assert told.returncode == 0, told.stderr
