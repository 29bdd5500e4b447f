"""How a model is trained: optimizer, schedule, what ends the run, evaluation, checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from moe_train.config.fields import STRICT, Beta, Fraction, NonNegative, Positive, PositiveFloat, Rate, Size, require

Moments = Literal["float32", "bfloat16"]


def _check_rounding(moments: Moments, stochastic_rounding: bool) -> None:
    require(
        moments == "bfloat16" or not stochastic_rounding,
        f"stochastic_rounding=true has nothing to round with moments={moments}: set moments=bfloat16, or leave it out",
    )


@dataclass(frozen=True, config=STRICT)
class AdamWConfig:
    """AdamW (arXiv 1711.05101); no decay on norms, biases and embeddings.

    `moments` and `stochastic_rounding` are how both moments are kept between steps (training/moments.py). They have
    values of their own here because configurations of older runs lack them.
    """

    kind: Literal["adamw"]
    lr: Rate
    betas: tuple[Beta, Beta]
    eps: PositiveFloat
    weight_decay: NonNegative
    max_grad_norm: PositiveFloat | None
    moments: Moments = "float32"
    stochastic_rounding: bool = False

    def __post_init__(self) -> None:
        _check_rounding(self.moments, self.stochastic_rounding)


@dataclass(frozen=True, config=STRICT)
class MuonConfig:
    """Muon for hidden matrices, stacked experts included (arXiv 2502.16982); AdamW for the rest, at the same rate.

    `moments` and `stochastic_rounding`: of Muon's momentum and of AdamW's moments alike.
    """

    kind: Literal["muon"]
    lr: Rate
    momentum: Beta
    nesterov: bool
    ns_steps: Positive
    weight_decay: NonNegative
    max_grad_norm: PositiveFloat | None
    adamw_betas: tuple[Beta, Beta]
    adamw_eps: PositiveFloat
    moments: Moments = "float32"
    stochastic_rounding: bool = False

    def __post_init__(self) -> None:
        _check_rounding(self.moments, self.stochastic_rounding)


OptimizerConfig = Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")]


@dataclass(frozen=True, config=STRICT)
class WarmupDecayConfig:
    """Learning rate over the run's progress from 0 to 1, which is counted in whatever stop condition ends it."""

    kind: Literal["wsd", "cosine", "constant"]
    warmup_fraction: Fraction
    decay_fraction: Fraction  # wsd only: the last part of the run, over which the rate falls linearly
    final_lr_fraction: Fraction  # of the peak rate

    def __post_init__(self) -> None:
        require(
            self.kind != "wsd" or self.warmup_fraction + self.decay_fraction <= 1,
            f"warmup_fraction={self.warmup_fraction} and decay_fraction={self.decay_fraction} overlap: "
            "their sum must be at most 1",
        )


@dataclass(frozen=True, config=STRICT)
class SegmentConfig:
    """One part of a schedule, from where the one before ends to `until`; `constant` is at `to` from its beginning."""

    until: Fraction  # of the run
    shape: Literal["constant", "linear", "cosine"]
    to: Fraction  # of the peak rate


@dataclass(frozen=True, config=STRICT)
class SegmentsConfig:
    """Learning rate in parts, the first starting from the peak: what published schedules are made of."""

    kind: Literal["segments"]
    warmup_fraction: Fraction
    segments: tuple[SegmentConfig, ...]

    def __post_init__(self) -> None:
        ends = [segment.until for segment in self.segments]
        require(
            bool(ends) and ends == sorted(set(ends)) and ends[-1] == 1 and ends[0] > 0,
            f"segments end at {ends}: each must end after the one before, and the last at 1.0",
        )


ScheduleConfig = Annotated[WarmupDecayConfig | SegmentsConfig, Field(discriminator="kind")]


@dataclass(frozen=True, config=STRICT)
class BatchRampConfig:
    """The batch grows from `start` sequences to batch_size over the first `tokens`, in multiples of `start`."""

    start: Size
    tokens: Positive


@dataclass(frozen=True, config=STRICT)
class StopConfig:
    """The first limit reached ends the run. With none given it ends after `default_tokens`."""

    steps: Positive | None
    tokens: Positive | None
    flops: PositiveFloat | None
    seconds: PositiveFloat | None  # of the whole process, start-up and evaluation included
    usd: PositiveFloat | None  # likewise, all devices
    default_tokens: Positive


@dataclass(frozen=True, config=STRICT)
class EvalConfig:
    every_tokens: Positive | None  # None: only at the end
    max_tokens: Positive | None  # None: the whole validation split


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    every_steps: Positive | None  # None: only at the end
    keep_last: Positive
