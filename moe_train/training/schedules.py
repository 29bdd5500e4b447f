"""Learning rate as a factor of its peak, over the run's progress rather than over steps.

Progress is whatever ends the run first (steps, tokens, FLOPs, seconds, dollars; see `limits`), so a run that is given
ten minutes or half a dollar warms up and anneals completely within it.
"""

from __future__ import annotations

import math

from moe_train.config import ScheduleConfig, SegmentsConfig, WarmupDecayConfig


def lr_factor(config: ScheduleConfig, progress: float, step_fraction: float = 0.0) -> float:
    """Factor in [0, 1] for a step that starts at `progress` (0 to 1) and is expected to advance it by `step_fraction`.

    Warm-up is read at the step's end and the decay at its start, so neither the first step nor the last is wasted on a
    rate of zero. Where `step_fraction` is not known (0), a first step at progress 0 has factor 0 if there is a warm-up.
    """
    warmup = min(1.0, (progress + step_fraction) / config.warmup_fraction) if config.warmup_fraction else 1.0
    progress = min(progress, 1.0)
    return warmup * (_segment(config, progress) if isinstance(config, SegmentsConfig) else _decay(config, progress))


def _segment(config: SegmentsConfig, progress: float) -> float:
    began, level = 0.0, 1.0
    for segment in config.segments:
        if progress <= segment.until and segment.shape != "constant":
            done = (progress - began) / (segment.until - began)
            shape = 1 - done if segment.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
            return segment.to + (level - segment.to) * shape
        if progress < segment.until:
            return segment.to
        began, level = segment.until, segment.to
    return level


def _decay(config: WarmupDecayConfig, progress: float) -> float:
    """From 1 down to `final_lr_fraction`."""
    if config.kind == "constant":
        return 1.0
    # Warmup-stable-decay (arXiv 2404.06395) decays over the last part only, cosine (arXiv 1608.03983) after warm-up.
    length = config.decay_fraction if config.kind == "wsd" else 1 - config.warmup_fraction
    done = max(0.0, progress - (1 - length)) / length if length else 0.0
    remaining = 1 - done if config.kind == "wsd" else (1 + math.cos(math.pi * done)) / 2
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * remaining
