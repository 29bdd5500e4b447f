"""suite=experts: the same experts a token, chosen from 8 and from 256."""

from __future__ import annotations

import dataclasses

from pydantic import ValidationError

from moe_train.benchmark import tax
from moe_train.benchmark.arms import TrainingArm, rates
from moe_train.benchmark.bench import Bench, described, experts_of
from moe_train.benchmark.figures import Figure, estimate, measured
from moe_train.benchmark.timing import interleaved
from moe_train.config import RunConfig
from moe_train.cost.flops import ROUTER, main_parameters, parameter_counts
from moe_train.errors import UserError

FEW, MANY = 8, 256


def run(bench: Bench, *usually: str) -> list[Figure]:
    config = bench.config(*(usually or tax.usual(bench)))
    configs = {count: with_experts(config, count) for count in (FEW, MANY)}
    arms = {count: TrainingArm(each, bench.runtime) for count, each in configs.items()}
    calls = {f"{count}": arm.step for count, arm in arms.items()}
    calls |= {f"{count} passes": arm.forward_backward for count, arm in arms.items()}
    seconds = interleaved(
        calls, bench.runtime.device, rounds=bench.effort.rounds, budget_seconds=2 * bench.effort.budget_seconds
    )
    of, suite = described(config, bench.runtime), bench.suite
    few, many = (active_without_routers(each) / 1e6 for each in configs.values())
    note = f"{few:.2f}M and {many:.2f}M active parameters without the routers"

    def lost(kind: str) -> list[float]:
        """Share of tokens a second, round by round."""
        return [1 - few / many for few, many in zip(seconds[f"{FEW}{kind}"], seconds[f"{MANY}{kind}"], strict=True)]

    figures = [
        measured(suite, "experts_8_to_256_slowdown", estimate(lost("")), "share", of, note),
        measured(suite, "experts_8_to_256_slowdown_forward_backward", estimate(lost(" passes")), "share", of,
                 "without clipping, optimizer and balancing"),
    ]  # fmt: skip
    for count, arm in arms.items():
        rate = estimate(rates(arm.tokens, seconds[f"{count}"]))
        figures.append(measured(suite, f"tokens_per_second_{count}_experts", rate, "tokens/s", of))
    return figures


def with_experts(config: RunConfig, count: int) -> RunConfig:
    """The run with `count` routed experts. Raises UserError."""
    moe = experts_of(config)
    try:
        model = dataclasses.replace(config.model, moe=dataclasses.replace(moe, num_experts=count))
    except ValueError as error:
        raise UserError(f"model={config.model.name} with {count} experts: {_reason(error)}") from None
    return dataclasses.replace(config, model=model)


def _reason(error: ValueError) -> str:
    """Of pydantic's error, the check that failed."""
    if isinstance(error, ValidationError):
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    return str(error)


def active_without_routers(config: RunConfig) -> int:
    """Parameters a token is multiplied with, but for the router, which has a row for every expert."""
    vocab_size = config.vocab_size
    return parameter_counts(config.model, vocab_size).active - main_parameters(config.model, vocab_size).get(ROUTER, 0)
