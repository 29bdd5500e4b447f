"""suite=tax: what an MoE pays for being sparse, against the dense model of equal FLOPs a token."""

from __future__ import annotations

import dataclasses

from moe_train.benchmark.arms import TrainingArm, rates
from moe_train.benchmark.bench import Bench, described, experts_of
from moe_train.benchmark.figures import Figure, estimate, measured, paired
from moe_train.benchmark.timing import interleaved
from moe_train.config import ModelConfig, RunConfig
from moe_train.cost.flops import training_flops_per_token
from moe_train.errors import UserError

_NEAR = 0.01  # the twin's FLOPs a token against the mixture's


def usual(bench: Bench) -> tuple[str, ...]:
    """64 experts, 6 of them and 2 shared ones a token; on a GPU 1,024 wide."""
    if bench.on_gpu:
        return ("model=base", "model.moe.num_experts=64", "data.sequence_length=1024", "batch_size=64")
    return ("model=tiny",)


def run(bench: Bench, *usually: str) -> list[Figure]:
    config = bench.config(*(usually or usual(bench)))
    dense_config, ratio = dense_twin(config)
    moe, dense = (TrainingArm(each, bench.runtime) for each in (config, dense_config))
    arms = {
        "moe": moe.step,
        "dense": dense.step,
        "moe_passes": moe.forward_backward,
        "dense_passes": dense.forward_backward,
    }
    seconds = interleaved(
        arms, bench.runtime.device, rounds=bench.effort.rounds, budget_seconds=2 * bench.effort.budget_seconds
    )
    of, suite = described(config, bench.runtime), bench.suite
    twin = f"twin: FFNs {dense.model_config.intermediate_size} wide, {ratio:.4f} times the FLOPs a token"
    return [
        measured(suite, "moe_tax", paired(seconds["moe"], seconds["dense"]), "ratio", of, twin),
        measured(suite, "moe_tax_forward_backward", paired(seconds["moe_passes"], seconds["dense_passes"]), "ratio", of,
                 "without clipping, optimizer and balancing"),
        measured(suite, "moe_tokens_per_second", estimate(rates(moe.tokens, seconds["moe"])), "tokens/s", of),
        measured(suite, "dense_tokens_per_second", estimate(rates(dense.tokens, seconds["dense"])), "tokens/s", of),
    ]  # fmt: skip


def dense_twin(config: RunConfig) -> tuple[RunConfig, float]:
    """The run of the dense twin, and its FLOPs a token over the mixture's. Raises UserError where they differ."""
    experts_of(config)
    model = dataclasses.replace(config.model, dense_twin_of_moe="equal_flops").resolved()
    twin = dataclasses.replace(config, model=model)
    ratio = _flops(model, config) / _flops(config.model, config)
    if abs(ratio - 1) > _NEAR:
        raise UserError(
            f"the dense twin of model={config.model.name} has {ratio:.3f} times its FLOPs a token, as widths are "
            "multiples of 8: choose a larger model"
        )
    return twin, ratio


def _flops(model: ModelConfig, config: RunConfig) -> float:
    return training_flops_per_token(model, config.data.sequence_length, config.vocab_size)
