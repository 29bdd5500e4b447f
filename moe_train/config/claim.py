"""A claim to be put to the test: what is compared, at which scale, and when a difference will count.

All of it is fixed in a file before the first run (configs/claim/NAME.yaml). What makes no sense in it is refused here.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from moe_train.config.fields import STRICT, Count, NonNegative, Positive, PositiveFloat, require

ScaleName = Literal["smoke", "cpu", "gpu"]

TO_TARGET = ("tokens_to_target", "flops_to_target", "seconds_to_target", "usd_to_target")
Measure = Literal[
    "val_loss",  # nats a token, at the end of the largest budget
    "max_violation",  # the fullest expert's load over the mean, less one, over the last third of the run
    "optimizer_bytes_per_param",  # of the states in the last checkpoint
    "cache_elements",  # kept a token and sequence while generating, counted in the cache itself
    "forecast_error",  # of a probe's twenty steps about the seconds of all steps, a share of what they took
    "generation_speed_up",  # of speculative over plain greedy decoding, tokens a second
    "tokens_to_target",  # what the arm needs for the loss at which `against` ends
    "flops_to_target",
    "seconds_to_target",
    "usd_to_target",
]
TIMED = (*TO_TARGET[2:], "forecast_error")  # what neighbours, devices and prices change
Kind = Literal["superiority", "non_inferiority", "tost", "ratio_above", "below", "above"]

MIN_BUDGETS = 4  # of a curve L = E + a C^-b: three unknowns and a degree of freedom
MIN_SEEDS = {"smoke": 2, "cpu": 3, "gpu": 3}  # with two, Student's t has one degree of freedom and nothing can be seen

Level = Annotated[float, Field(gt=0, lt=0.5)]


@dataclass(frozen=True, config=STRICT)
class TestConfig:
    """When a comparison counts. Effects are arm − against, lower being better, unless said otherwise.

    superiority: below −margin. non_inferiority: below +margin. tost: within ±margin. ratio_above: against / arm above
    margin. below, above: the arm's own measure, with nothing it is held against.
    """

    __test__ = False  # for pytest

    kind: Kind
    margin: Annotated[float, Field(allow_inf_nan=False)]
    alpha: Level = 0.05  # of each of the two mistakes, supported and refuted
    relative: bool = False  # the effect is log(arm / against): a margin of 0.0025 is a quarter of a percent

    def __post_init__(self) -> None:
        require(
            self.margin > 0 or self.kind not in ("tost", "ratio_above"),
            f"margin={self.margin:g} of kind={self.kind} must be above 0",
        )
        require(
            self.margin >= 0 or self.kind in ("below", "above"),
            f"margin={self.margin:g} of kind={self.kind} must not be below 0: kind=non_inferiority allows the "
            "arm to be higher by a margin",
        )


@dataclass(frozen=True, config=STRICT)
class ComparisonConfig:
    arm: str
    against: str | None
    measure: Measure
    test: TestConfig
    decides: bool = True  # False: reported, in a family of its own, and no part of the verdict
    paired: bool = True  # by seed; False where the arms have other seeds

    def __post_init__(self) -> None:
        alone, kind = self.against is None, self.test.kind
        require(
            alone == (kind in ("below", "above")),
            f"kind={kind} of arm {self.arm} "
            + ("needs against=ARM" if alone else "looks at one arm: leave out against"),
        )
        require(self.arm != self.against, f"arm {self.arm} is held against itself: name another under against")
        require(
            not self.test.relative or kind in ("superiority", "non_inferiority", "tost"),
            f"relative: true of arm {self.arm} is for differences: kind={kind} takes its margin as it is",
        )
        require(
            self.paired or self.measure not in TO_TARGET,
            f"measure={self.measure} of arm {self.arm} draws seeds in pairs: leave out paired",
        )
        require(
            (kind == "ratio_above") or self.measure not in TO_TARGET,
            f"measure={self.measure} is a ratio of costs: take kind=ratio_above",
        )

    @property
    def name(self) -> str:
        sides = self.arm if self.against is None else f"{self.arm} against {self.against}"
        return f"{sides}: {self.measure}"

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.arm,) if self.against is None else (self.arm, self.against)


@dataclass(frozen=True, config=STRICT)
class ArmConfig:
    overrides: tuple[str, ...]  # of the ordinary configuration
    seed_offset: Count = 0  # added to every seed
    flops_of: str | None = None  # trained for as many FLOPs as that arm, not as many tokens
    starts_from: str | None = None  # each run begins with the weights of that arm's, whose cost is counted with it

    @property
    def rests_on(self) -> tuple[str, ...]:
        """Arms that have to be there for this one."""
        return tuple(other for other in (self.flops_of, self.starts_from) if other is not None)


@dataclass(frozen=True, config=STRICT)
class TuningConfig:
    """The learning rate of every arm is the best of the same multiples of its own, after `tokens`, over `seeds`.

    `together`: one multiple for all arms, the best for their losses taken together. For arms that differ in rounding
    alone, where a rate chosen for each on a short run is a larger difference than the one that is looked for.
    `widenings`: how often, where an arm's best is at an edge of the grid, all arms get a further multiple beyond it.
    """

    factors: Annotated[tuple[PositiveFloat, ...], Field(min_length=2)]
    tokens: Positive
    seeds: Positive = 1
    together: bool = False
    widenings: Annotated[Count, Field(le=8)] = 0

    def __post_init__(self) -> None:
        factors = list(self.factors)
        require(factors == sorted(set(factors)), f"tuning.factors={factors}: they ascend, each once")


@dataclass(frozen=True, config=STRICT)
class ScaleConfig:
    overrides: tuple[str, ...]
    tokens: Annotated[tuple[Positive, ...], Field(min_length=1)]  # budgets, ascending
    seeds: Annotated[Positive, Field(le=1000)]
    tuning: TuningConfig | None = None
    first_seed: Annotated[Count, Field(lt=900_000)] = 0  # of a suite made again: seeds whose losses nobody has seen
    arms: dict[str, tuple[str, ...]] | None = None  # overrides of an arm at this scale, after its own
    without: tuple[str, ...] = ()  # arms left out at this scale, and what is said of them

    def __post_init__(self) -> None:
        require(list(self.tokens) == sorted(set(self.tokens)), f"tokens={list(self.tokens)}: budgets ascend, each once")


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ClaimConfig:
    """One statement, its arms and comparisons. It is supported where all deciding comparisons are."""

    number: Positive | None = None  # of the ten claims; None: one of the others
    statement: str
    source: str
    published: str  # the figure there
    base: tuple[str, ...] = ()  # overrides common to all arms
    arms: dict[str, ArmConfig]
    varies: tuple[str, ...]  # keys in which arms may differ, a prefix each; anything else is refused
    equal: dict[str, NonNegative] = Field(default_factory=dict)  # figure → how far compared arms may be apart, a share
    comparisons: Annotated[tuple[ComparisonConfig, ...], Field(min_length=1)]
    sigma: PositiveFloat  # standard deviation between seeds (of pairs) that the power is reckoned with
    scales: dict[ScaleName, ScaleConfig]
    carries_over: str
    does_not_carry_over: str

    def __post_init__(self) -> None:
        for arm in self.arms:
            plain = re.fullmatch(r"[A-Za-z0-9_]+", arm) is not None
            require(plain, f"arm {arm}: use letters, digits and _ in its name")
        for key in ("statement", "source", "published", "carries_over", "does_not_carry_over"):
            text: str = getattr(self, key)
            require(bool(text.strip()), f"{key} is empty: say it in a sentence")
            require("\n" not in text.strip(), f"{key} has several lines: write it on one, or fold it with >-")
        asked = [(c.arm, c.against, c.measure, c.test.kind, c.test.margin) for c in self.comparisons]
        for each in asked:
            require(asked.count(each) == 1, f"the comparison {each[0]} against {each[1]} in {each[2]} is there twice")
        named = [arm for comparison in self.comparisons for arm in comparison.arms]
        named += [other for arm in self.arms.values() for other in arm.rests_on]
        for scale in self.scales.values():
            named += [*(scale.arms or {}), *scale.without]
        for arm in named:
            require(arm in self.arms, f"there is no arm {arm}: there are {', '.join(self.arms)}")
        self._check_what_arms_rest_on()
        require(any(c.decides for c in self.comparisons), "no comparison decides: give one decides: true")
        for key in self.equal:
            known = ("total_params", "active_params", "flops_per_token")
            require(key in known, f"equal.{key} is unknown: choose from {', '.join(known)}")
        for name, scale in self.scales.items():
            least = MIN_SEEDS[name]
            require(
                scale.seeds >= least,
                f"scales.{name}.seeds={scale.seeds} is too few for a test: give at least {least}",
            )
            curves = any(c.measure in TO_TARGET for c in self.at(name))
            require(
                not curves or len(scale.tokens) >= MIN_BUDGETS,
                f"scales.{name}.tokens has {len(scale.tokens)} budgets, too few for a curve: give {MIN_BUDGETS}",
            )
            require(
                any(c.decides for c in self.at(name)),
                f"scales.{name}.without leaves no comparison that decides: take fewer arms out",
            )
        for comparison in self.comparisons:
            offsets = {self.arms[arm].seed_offset for arm in comparison.arms}
            require(
                not comparison.paired or len(offsets) == 1,
                f"{comparison.name}: the arms have other seeds, and so other data: say paired: false",
            )

    def _check_what_arms_rest_on(self) -> None:
        order = list(self.arms)
        for name, arm in self.arms.items():
            for other in arm.rests_on:
                key = "starts_from" if other == arm.starts_from else "flops_of"
                require(
                    self.arms[other].flops_of is None and (key == "flops_of" or self.arms[other].starts_from is None),
                    f"arm {name}: {key}={other} rests on another arm itself: name one that does not",
                )
                require(
                    key == "flops_of" or order.index(other) < order.index(name),
                    f"arm {name}: {key}={other} is made after it: write arm {other} above arm {name}",
                )
                for scale, settings in self.scales.items():
                    require(
                        other not in settings.without or name in settings.without,
                        f"scales.{scale}.without leaves out arm {other}, which arm {name} needs ({key}): leave out "
                        "both, or neither",
                    )

    def arms_at(self, scale: ScaleName) -> list[str]:
        """The arms trained at a scale, in the file's order."""
        return [arm for arm in self.arms if arm not in self.scales[scale].without]

    def at(self, scale: ScaleName) -> list[ComparisonConfig]:
        """The comparisons whose arms are all trained at a scale."""
        return [c for c in self.comparisons if not set(c.arms) & set(self.scales[scale].without)]

    def pairs_at(self, scale: ScaleName) -> list[tuple[str, str]]:
        """Arms that some comparison of the scale holds against each other."""
        return list(dict.fromkeys((c.arm, c.against) for c in self.at(scale) if c.against is not None))
