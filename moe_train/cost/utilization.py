"""How much of the hardware a run used: against one peak, and against the peak of the format each product runs in.

Model FLOPs utilisation (MFU; PaLM, arXiv 2204.02311, appendix B) divides the model's FLOPs by what the device could do
at its dense peak in one format. Where formats are mixed there is no one peak: DeepSeek-V3 used 39% of an H800's BF16
peak or 20% of its FP8 peak, and both are true. `ideal_seconds` weighs them: the time the products would take if each
ran at the peak of its own format. Ideal over real time is the mixed-precision utilisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from moe_train.config import ModelConfig, PeakConfig
from moe_train.cost.flops import ATTENTION_CORE, HEAD, ROUTER, main_forward_flops, mtp_forward_flops

Format = Literal["float32", "tensorfloat32", "bfloat16", "float8"]


def formats_of_parts(compute: Format, router: Format = "float32") -> dict[str, Format]:
    """In what format the parts multiply that no recipe rounds to FP8; parts not named are linear layers.

    router: FP32, but TF32 where a GPU computes in BF16 (model/router.py). Attention core and head stay in the compute
    format, as in DeepSeek-V3 (arXiv 2412.19437, section 3.3.1).
    """
    return {ROUTER: router, ATTENTION_CORE: compute, HEAD: compute}


def flops_by_format(
    model: ModelConfig,
    sequence_length: int,
    vocab_size: int,
    compute: Format,
    linear: Format | None = None,
    router: Format = "float32",
) -> dict[Format, float]:
    """Training FLOPs per token in each format. They add up to `training_flops_per_token`.

    linear: what linear layers multiply in, where that is not `compute`: float8 with a recipe and a device that has it.
    """
    formats, linear = formats_of_parts(compute, router), linear or compute
    found: dict[Format, float] = {}
    for parts in (
        main_forward_flops(model, sequence_length, vocab_size),
        mtp_forward_flops(model, sequence_length, vocab_size),
    ):
        for part, count in parts.items():
            name = formats.get(part, linear)
            found[name] = found.get(name, 0.0) + 3 * count
    return {name: count for name, count in found.items() if count}


def ideal_seconds(flops: Mapping[Format, float], peaks: PeakConfig) -> float | None:
    """Seconds one device needs for `flops` at its peaks (TFLOP/s); None where the peak of a format is not known."""
    total = 0.0
    for name, count in flops.items():
        peak = _peak(name, peaks)
        if peak is None:
            return None
        total += count / (peak * 1e12)
    return total


def _peak(name: Format, peaks: PeakConfig) -> float | None:
    """TF32's is half of BF16's on every GPU here that has it (data sheets; A100: 156 of 312, H100: 494.7 of 989.4)."""
    if name == "tensorfloat32":
        return None if peaks.bfloat16 is None else peaks.bfloat16 / 2
    peak: float | None = getattr(peaks, name)
    return peak
