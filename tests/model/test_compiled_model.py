"""A model that torch.compile traces is one graph, which batches with other routing do not make again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_model import SMALL
from torch._dynamo.utils import counters

from moe_train.config import RunConfig
from moe_train.model.transformer import Transformer
from moe_train.precision import recipes

MIXTURE = SMALL[-3:]  # a choice of model/moe brings its own
ARMS = {
    "latent attention": (torch.float32, []),
    "latent attention in BF16": (torch.bfloat16, []),
    "checkpointed": (torch.bfloat16, ["activation_checkpointing=true"]),
    "two tokens ahead": (torch.bfloat16, ["model/mtp=depth_1"]),
    "groups of experts": (torch.float32, ["model/moe=group_limited", *MIXTURE]),
    "capacity": (torch.bfloat16, ["model/moe=switch", *MIXTURE, "model.moe.top_k=1"]),
    "experts that choose": (torch.float32, ["model/moe=expert_choice", *MIXTURE]),
    "FP8": (torch.float32, ["precision=fp8_deepseek"]),
}


@pytest.mark.parametrize("arm", ARMS)
def test_there_is_no_graph_break_and_nothing_is_compiled_again(arm: str, compose_run: Callable[..., RunConfig]) -> None:
    dtype, settings = ARMS[arm]
    small = [*SMALL, "model.num_hidden_layers=2", "model.initializer_range=0.2"]
    config = compose_run("model=nano", *small, "precision=fp32", *settings)
    model = Transformer(config.model.resolved(), 64, config.z_loss_weight, config.activation_checkpointing)
    model.initialise(0)
    recipes.apply(model, config.precision, torch.device("cpu"))
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            inputs, targets = torch.randint(0, 64, (2, 4, 16), generator=generator)
            found = []
            for function in (model, compiled):
                with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
                    objective = function(inputs, targets, 0.1).objective
                objective.backward()
                found.append(objective.item())
            assert found[1] == pytest.approx(found[0], rel=1e-6 if dtype is torch.float32 else 1e-3)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
