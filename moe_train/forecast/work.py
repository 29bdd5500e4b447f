"""Seconds one device computes for a token, in the parts they fall into, each at a rate that others measured.

Products take their FLOPs (`cost/flops.py`) at a measured share of their format's peak. Between them data only pass
through memory: norms with their residuals, rotations, SwiGLU, expert rows brought in order, and with FP8 every
operand quantised (its input once forward and again along the tokens, its gradient along both, arXiv 2412.19437,
section 3.3). As there (section 3.2.3), norms, SwiGLU and MLA's up-projections are computed again in the backward pass.
Weight gradients are added to FP32 sums once a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config import HardwareConfig, MLAConfig, ModelConfig
from moe_train.cost.flops import (
    ATTENTION_CORE,
    ATTENTION_PROJECTIONS,
    HEAD,
    MTP,
    ROUTER,
    layer_kinds,
    main_forward_flops,
    mtp_forward_flops,
)
from moe_train.cost.optimizer_memory import layer_matrices
from moe_train.errors import UserError
from moe_train.forecast import rates

ATTENTION, MEMORY = "attention", "passes through memory"
FP8, BF16, FP32 = "products in FP8", "products in BF16", "products in FP32"
GRADIENT_SUM_BYTES = 8  # an FP32 sum is read and written


@dataclass(frozen=True)
class Passes:
    """Seconds a token: forward, backward without weight gradients, weight gradients."""

    forward: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.inputs + other.inputs, self.weights + other.weights)

    def __mul__(self, factor: float) -> Passes:
        return Passes(self.forward * factor, self.inputs * factor, self.weights * factor)

    @property
    def seconds(self) -> float:
        return self.forward + self.inputs + self.weights


@dataclass(frozen=True)
class Speeds:
    """Of one device: FLOP/s by what is multiplied, bytes/s of its memory. Raises UserError where one is not known."""

    projections: float
    experts: float
    bf16: float
    fp32: float
    attention_forward: float
    attention_backward: float
    memory: float

    @classmethod
    def of(cls, hardware: HardwareConfig, fp8: bool) -> Speeds:
        peaks = hardware.peak_tflops
        if peaks.bfloat16 is None or peaks.float32 is None or hardware.bandwidth_tb_s is None:
            raise UserError(
                f"hardware={hardware.name} lacks its peaks or bandwidth: choose another or give its file them"
            )
        if fp8 and peaks.float8 is None:
            raise UserError(f"hardware={hardware.name} multiplies no FP8: choose precision=bf16")
        bf16 = peaks.bfloat16 * 1e12
        linear = (peaks.float8 or 0.0) * 1e12
        return cls(
            projections=linear * rates.FP8_PROJECTION_SHARE if fp8 else bf16 * rates.BF16_SHARE,
            experts=linear * rates.FP8_EXPERT_SHARE if fp8 else bf16 * rates.BF16_SHARE,
            bf16=bf16 * rates.BF16_SHARE,
            fp32=peaks.float32 * 1e12 * rates.BF16_SHARE,
            attention_forward=bf16 * rates.ATTENTION_FORWARD_SHARE,
            attention_backward=bf16 * rates.ATTENTION_BACKWARD_SHARE,
            memory=hardware.bandwidth_tb_s * 1e12 * rates.MEMORY_SHARE,
        )


def work(model: ModelConfig, sequence_length: int, vocab_size: int, speeds: Speeds, fp8: bool) -> dict[str, Passes]:
    """Of all layers, MTP modules and heads. Sums of gradients, a matter of micro-batches, are left out."""
    linear = FP8 if fp8 else BF16
    found = {ATTENTION: Passes(), MEMORY: Passes(), BF16: Passes(), FP32: Passes(), linear: Passes()}
    for parts in (
        main_forward_flops(model, sequence_length, vocab_size),
        mtp_forward_flops(model, sequence_length, vocab_size),
    ):
        for part, flops in parts.items():
            if part == ATTENTION_CORE:
                backward = rates.ATTENTION_BACKWARD_WORK * flops / speeds.attention_backward
                found[ATTENTION] += Passes(flops / speeds.attention_forward, backward)
            elif part in (HEAD, ROUTER):
                name, speed = (BF16, speeds.bf16) if part == HEAD else (FP32, speeds.fp32)
                found[name] += Passes(*[flops / speed] * 3)
            else:
                speed = speeds.projections if part in (ATTENTION_PROJECTIONS, MTP) else speeds.experts
                found[linear] += Passes(*[flops / speed] * 3)
    for is_moe, count in all_layers(model):
        found[linear] += Passes(inputs=count * 2 * _up_projections(model) / speeds.projections)
        found[MEMORY] += _bytes_passed(model, is_moe, fp8) * (count / speeds.memory)
    return {name: passes for name, passes in found.items() if passes.seconds}


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


def _bytes_passed(model: ModelConfig, is_moe: bool, fp8: bool) -> Passes:
    """Bytes read and written for a token in one layer, where no product does it; BF16 unless FP8."""
    hidden, a, moe = model.hidden_size, model.attention, model.moe
    norms = 2 * 8 * hidden  # each reads and writes its input and the residual
    if isinstance(a, MLAConfig):
        rotations = 8 * a.num_attention_heads * a.qk_head_dim
    else:
        rotations = 4 * (a.num_attention_heads + a.num_key_value_heads) * a.head_dim
    routed = moe.experts_per_token if is_moe and moe is not None else 0.0
    if is_moe and moe is not None:
        swiglu = 6 * (routed + moe.num_shared_experts) * moe.moe_intermediate_size
    else:
        swiglu = 6.0 * model.intermediate_size
    ordering = routed * hidden * ((2 if fp8 else 4) + 2) + 2 * hidden * bool(routed)  # into experts' order and back
    forward = norms + rotations + swiglu + ordering
    passes = Passes(forward, 2 * forward + norms + swiglu)
    if fp8:
        for count, rows, columns in layer_matrices(model, is_moe, 1):
            visits = routed if is_moe and moe is not None and count == moe.num_experts else 1
            arrives_in_fp8 = count > 1 and columns == hidden
            passes += Passes(0 if arrives_in_fp8 else 3 * columns, 2 * rows, 2 * (rows + columns)) * visits
    return passes
