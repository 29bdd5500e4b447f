"""A search: what it may choose, what it is judged by, when a run is given up (configs/sweep/NAME.yaml)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from moe_train.config.fields import STRICT, Count, Positive, require

Value = str | int | float | bool | None

# What a run can be judged by: entries of its summary.json, of all of which less is better.
Figure = Literal[
    "val_bits_per_byte",
    "val_loss",
    "usd_total",
    "usd_train",
    "train_seconds",
    "wall_seconds",
    "energy_kwh",
    "peak_memory_bytes",
]
# What a rule may put beside a setting.
Size = Literal["active_params", "total_params", "tokens", "flops_per_token"]


@dataclass(frozen=True, config=STRICT)
class ChoicesConfig:
    """One of these values of the key."""

    kind: Literal["choices"]
    choices: tuple[Value, ...]

    def __post_init__(self) -> None:
        require(len(set(self.choices)) >= 1, "choices is empty: give values to choose from")
        require(len(set(self.choices)) == len(self.choices), f"choices={list(self.choices)}: name each once")


@dataclass(frozen=True, config=STRICT)
class NamedConfig:
    """One of these groups of overrides, each under a name of its own; the key is a name too, and no setting."""

    kind: Literal["named"]
    choices: dict[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        require(len(self.choices) >= 1, "choices is empty: give overrides to choose from, each under a name")


@dataclass(frozen=True, config=STRICT)
class FloatConfig:
    """A number of this range, ends included; `log`: as likely below as above the geometric mean."""

    kind: Literal["float"]
    low: Annotated[float, Field(allow_inf_nan=False)]
    high: Annotated[float, Field(allow_inf_nan=False)]
    log: bool = False

    def __post_init__(self) -> None:
        _check_range(self.low, self.high, self.log)


@dataclass(frozen=True, config=STRICT)
class IntConfig:
    """A whole number of this range, ends included, in steps of `step`."""

    kind: Literal["int"]
    low: int
    high: int
    log: bool = False
    step: Positive = 1

    def __post_init__(self) -> None:
        _check_range(self.low, self.high, self.log)
        require(not (self.log and self.step != 1), f"step={self.step} and log=true: leave out one of them")
        above = self.high - self.low
        require(above % self.step == 0, f"high={self.high} is no whole number of step={self.step} above low={self.low}")


def _check_range(low: float, high: float, log: bool) -> None:
    require(low < high, f"low={low:g} is not below high={high:g}: swap or change them")
    require(low > 0 or not log, f"low={low:g} has no logarithm: raise it, or leave out log")


DimensionConfig = Annotated[ChoicesConfig | NamedConfig | FloatConfig | IntConfig, Field(discriminator="kind")]
LevelConfig = Annotated[ChoicesConfig | NamedConfig, Field(discriminator="kind")]


@dataclass(frozen=True, config=STRICT)
class PruningConfig:
    """Runs are evaluated every `every_tokens` and given up where they are behind the others after as many tokens.

    median: worse than half of them. successive_halving: not among the best quarter at every rung (ASHA).
    """

    kind: Literal["median", "successive_halving"]
    every_tokens: Positive
    warmup_tokens: Count = 0  # before which no run is given up
    startup_trials: Count = 4  # median: that are finished before any is given up


@dataclass(frozen=True, config=STRICT)
class RuleConfig:
    """log y = log c + a log x, fitted over the best of every study of `for_each`; each a key or a figure."""

    y: str
    x: str


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SweepConfig:
    """`for_each`: a study of its own for each choice of this one key. `trials`: of each study; a grid makes all."""

    question: str
    base: tuple[str, ...] = ()  # overrides common to all runs
    objectives: Annotated[tuple[Figure, ...], Field(min_length=1, max_length=2)]
    for_each: dict[str, LevelConfig] = Field(default_factory=dict)
    space: dict[str, DimensionConfig]
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    trials: Positive | None = None
    pruning: PruningConfig | None = None
    rule: RuleConfig | None = None

    def __post_init__(self) -> None:
        require(len(self.space) > 0, "space is empty: give it a key to search over")
        require(
            len(self.for_each) <= 1, "for_each has several keys: give one, or name groups of overrides (kind: named)"
        )
        both = sorted(set(self.space) & set(self.for_each))
        require(not both, f"{both and both[0]} stands in space and in for_each: leave out one of them")
        ranges = [key for key, each in self.space.items() if isinstance(each, FloatConfig | IntConfig)]
        if self.sampler == "grid":
            require(not ranges, f"sampler=grid tries all there is, and {ranges and ranges[0]} is a range: give choices")
            require(self.trials is None, "sampler=grid tries all there is: leave out trials")
        else:
            require(self.trials is not None, "trials is missing: say how many runs each study makes")
        require(len(set(self.objectives)) == len(self.objectives), "objectives: name each once")
        if self.pruning is not None:
            require(
                self.objectives in (("val_bits_per_byte",), ("val_loss",)),
                "pruning looks at validation losses: it goes with the one objective val_bits_per_byte or val_loss",
            )
        if self.rule is not None:
            require(bool(self.for_each), "rule is fitted over the studies of for_each: give that too")
            known = [*self.space, *self.for_each, *_FIGURES]
            for axis, name in (("y", self.rule.y), ("x", self.rule.x)):
                require(name in known, f"rule.{axis}={name} is neither a key here nor one of {', '.join(_FIGURES)}")
            require(
                not any(
                    isinstance({**self.space, **self.for_each}.get(n), NamedConfig) for n in (self.rule.y, self.rule.x)
                ),
                "rule: a named group is no number: take a figure",
            )


_FIGURES: tuple[str, ...] = (*Size.__args__, *Figure.__args__)  # type: ignore[attr-defined]
