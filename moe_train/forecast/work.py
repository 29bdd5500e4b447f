"""Seconds one device computes for a token, in the parts they fall into, each at a rate that others measured.

Products take their FLOPs (`cost/flops.py`) at a measured share of their format's peak. Between them data only pass
through memory (`memory_passes.py`). MLA's up-projections are computed again in the backward pass (arXiv 2412.19437,
section 3.2.3).
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config import HardwareConfig, MLAConfig, ModelConfig
from moe_train.cost.flops import (
    ATTENTION_CORE,
    ATTENTION_PROJECTIONS,
    HEAD,
    MTP,
    ROUTED_EXPERTS,
    ROUTER,
    layer_kinds,
    main_forward_flops,
    mtp_forward_flops,
)
from moe_train.errors import UserError
from moe_train.forecast import rates
from moe_train.forecast.memory_passes import layer_bytes, loss_bytes
from moe_train.forecast.passes import Passes
from moe_train.forecast.rates import AttentionKernel

ATTENTION, MEMORY = "attention", "passes through memory"
FP8, BF16, FP32 = "products in FP8", "products in BF16", "products in FP32"
GRADIENT_SUM_BYTES = 8  # an FP32 sum is read and written


Rate = tuple[float, float]  # FLOP/s of a product and its input's gradient, and of its weights' gradient


@dataclass(frozen=True)
class Speeds:
    """Of one device: FLOP/s by what is multiplied, bytes/s of its memory. Raises UserError where one is not known."""

    projections: Rate
    up_projections: float  # of MLA
    dense: Rate  # FFNs that every token passes, shared experts among them
    experts: Rate
    bf16: float
    fp32: float
    attention_forward: float
    attention_backward: float
    memory: float

    @classmethod
    def of(cls, hardware: HardwareConfig, model: ModelConfig, fp8: bool, kernel: AttentionKernel) -> Speeds:
        peaks = hardware.peak_tflops
        if peaks.bfloat16 is None or peaks.float32 is None or hardware.bandwidth_tb_s is None:
            raise UserError(
                f"hardware={hardware.name} lacks its peaks or bandwidth: choose another or give its file them"
            )
        if fp8 and peaks.float8 is None:
            raise UserError(f"hardware={hardware.name} multiplies no FP8: choose precision=bf16")
        bf16 = peaks.bfloat16 * 1e12
        forward, backward = rates.ATTENTION_SHARES[kernel]
        if wide_queries(model):
            forward *= rates.WIDE_QUERIES_SLOWER[kernel]

        def rate(in_fp8: Rate, in_bf16: float) -> Rate:
            products, gradients = in_fp8 if fp8 else (in_bf16, in_bf16)
            peak = (peaks.float8 or 0.0) * 1e12 if fp8 else bf16
            return peak * products, peak * gradients

        return cls(
            projections=rate(rates.FP8_PROJECTION_SHARES, rates.BF16_SHARE),
            up_projections=rate((rates.FP8_UP_PROJECTION_SHARE,) * 2, rates.BF16_SHARE)[0],
            dense=rate(rates.FP8_DENSE_SHARES, rates.BF16_SHARE),
            experts=rate(rates.FP8_EXPERT_SHARES, rates.BF16_EXPERT_SHARE),
            bf16=bf16 * rates.BF16_SHARE,
            fp32=peaks.float32 * 1e12 * rates.BF16_SHARE,
            attention_forward=bf16 * forward,
            attention_backward=bf16 * backward,
            memory=hardware.bandwidth_tb_s * 1e12 * rates.MEMORY_SHARE,
        )

    def linear(self, part: str) -> Rate:
        """Of a part of `cost/flops.py`."""
        if part in (ATTENTION_PROJECTIONS, MTP):
            return self.projections
        return self.experts if part == ROUTED_EXPERTS else self.dense


def work(
    model: ModelConfig,
    sequence_length: int,
    vocab_size: int,
    speeds: Speeds,
    *,
    fp8: bool,
    kernel: AttentionKernel,
    devices: float,
) -> dict[str, Passes]:
    """Of all layers, MTP modules and heads. Sums of gradients, a matter of micro-batches, are left out.

    `devices`: those on which a token's experts lie, on average.
    """
    linear = FP8 if fp8 else BF16
    found = {ATTENTION: Passes(), MEMORY: Passes(), BF16: Passes(), FP32: Passes(), linear: Passes()}
    for parts in (
        main_forward_flops(model, sequence_length, vocab_size),
        mtp_forward_flops(model, sequence_length, vocab_size),
    ):
        for part, flops in parts.items():
            if part == ATTENTION_CORE:
                backward = _attention_backward(model, kernel) * flops / speeds.attention_backward
                found[ATTENTION] += Passes(flops / speeds.attention_forward, backward)
            elif part in (HEAD, ROUTER):
                name, speed = (BF16, speeds.bf16) if part == HEAD else (FP32, speeds.fp32)
                found[name] += Passes(*[flops / speed] * 3)
            else:
                products, gradients = speeds.linear(part)
                found[linear] += Passes(flops / products, flops / products, flops / gradients)
    for is_moe, count in all_layers(model):
        found[linear] += Passes(inputs=count * 2 * _up_projections(model) / speeds.up_projections)
        found[MEMORY] += layer_bytes(model, is_moe, fp8, devices) * (count / speeds.memory)
    found[MEMORY] += loss_bytes(model, vocab_size) * (1 / speeds.memory)
    return {name: passes for name, passes in found.items() if passes.seconds}


def wide_queries(model: ModelConfig) -> bool:
    """Whether queries and keys of a head are wider than its values."""
    return isinstance(model.attention, MLAConfig) and model.attention.qk_head_dim > model.attention.v_head_dim


def _attention_backward(model: ModelConfig, kernel: AttentionKernel) -> float:
    """Its FLOPs over forward's: scores are made again, and of five products three are as wide as queries."""
    a = model.attention
    wide, narrow = (a.qk_head_dim, a.v_head_dim) if isinstance(a, MLAConfig) else (a.head_dim, a.head_dim)
    padded = max(wide, narrow) if rates.PADS_VALUES[kernel] else narrow
    return (3 * wide + 2 * padded) / (wide + narrow)


def all_layers(model: ModelConfig) -> list[tuple[bool, int]]:
    """(whether it is an MoE layer, how many), those of MTP modules too."""
    return [*layer_kinds(model), *([(model.moe is not None, model.mtp_depth)] if model.mtp_depth else [])]


def _up_projections(model: ModelConfig) -> int:
    """Weights of MLA's, whose outputs are not kept for the backward pass."""
    a = model.attention
    if not isinstance(a, MLAConfig):
        return 0
    heads = a.num_attention_heads
    return heads * ((a.q_lora_rank or 0) * a.qk_head_dim + a.kv_lora_rank * (a.qk_nope_head_dim + a.v_head_dim))
