"""From a search space to Optuna's distributions, and from what Optuna suggests to overrides of train.py."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from moe_train.compose import compose_unchecked, key_of, quoted
from moe_train.config.sweep import ChoicesConfig, FloatConfig, IntConfig, NamedConfig, Value
from moe_train.errors import UserError

Dimension = ChoicesConfig | NamedConfig | FloatConfig | IntConfig
Params = Mapping[str, Any]


def choices_of(dimension: Dimension) -> list[Value]:
    """What it may be; of a range, its ends."""
    if isinstance(dimension, ChoicesConfig | NamedConfig):
        return list(dimension.choices)
    return [dimension.low, dimension.high]


def distributions(space: Mapping[str, Dimension]) -> dict[str, BaseDistribution]:
    found: dict[str, BaseDistribution] = {}
    for key, each in space.items():
        if isinstance(each, FloatConfig):
            found[key] = FloatDistribution(each.low, each.high, log=each.log)
        elif isinstance(each, IntConfig):
            found[key] = IntDistribution(each.low, each.high, log=each.log, step=each.step)
        else:
            found[key] = CategoricalDistribution(choices_of(each))
    return found


def grid(space: Mapping[str, Dimension]) -> list[dict[str, Value]]:
    """Every combination of choices."""
    return [dict(zip(space, values)) for values in itertools.product(*(choices_of(each) for each in space.values()))]


def overrides_of(space: Mapping[str, Dimension], params: Params) -> list[str]:
    """What train.py is told; six digits of a number are enough, and give a run the same hash everywhere."""
    found: list[str] = []
    for key, value in params.items():
        dimension = space[key]
        found += dimension.choices[value] if isinstance(dimension, NamedConfig) else [f"{key}={as_text(value)}"]
    return found


def as_text(value: Value) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value) if isinstance(value, int) or re.fullmatch(r"[\w./+-]+", value) else quoted(value)


def label(params: Params) -> str:
    return " ".join(f"{key}={as_text(value)}" for key, value in params.items())


def _keys(overrides: Sequence[str]) -> list[str]:
    return [key_of(override) for override in overrides]


def _keys_of(name: str, dimension: Dimension) -> list[str]:
    """The settings that it chooses."""
    if isinstance(dimension, NamedConfig):
        return _keys([override for overrides in dimension.choices.values() for override in overrides])
    return [name]


def _is_of_the_search(key: str) -> bool:
    return key.split(".")[0] in ("run_dir", "resume", "name", "budget")


def check_space(
    space: Mapping[str, Dimension], before: Sequence[str], given: Sequence[str], where: str, config_dir: Path | None
) -> None:
    """Whether every key and every choice exists, each tried for itself. Raises UserError naming file and key."""
    chosen = [key for dimension, each in space.items() for key in _keys_of(dimension, each)]
    for key in _keys(given):
        if key in chosen:
            raise UserError(f"{key} is searched over by {where}: leave {key}= out, or take it out of space there")
        if _is_of_the_search(key):
            raise UserError(f"{key}= is set by the search itself: leave it out (out= and runs= say where it writes)")
    for key in chosen:
        if _is_of_the_search(key):
            raise UserError(f"{where}: space.{key} is set by the search itself: take it out")
    for key in _keys(before):
        if _is_of_the_search(key):
            raise UserError(f"{where}: {key} is set by the search itself: take it out")
    first = {key: choices_of(each)[0] for key, each in space.items()}
    for key, each in space.items():
        for value in choices_of(each):
            try:
                compose_unchecked([*before, *given, *overrides_of(space, {**first, key: value})], config_dir)
            except UserError as error:
                raise UserError(f"{where}, {key}={as_text(value)}: {error}") from None
