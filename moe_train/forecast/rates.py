"""What others measured of each kind of work, as shares of what the device is rated at: nothing here is fitted.

They carry a prediction from parts (`parts.py`) from a device's data sheet to what kernels reach on it. All are of
Hopper; on other devices the same shares are taken. None was derived from how long a training run took.
"""

from __future__ import annotations

from typing import Literal

# TFLOP/s of FP8 products in DeepSeek-V3's shapes on an H800: (N, K) at M = 4096, and of four experts with 8,192 rows
# each (DeepGEMM, README of February 2025; read in copies), which by its announcement powers V3's training. Gradients of
# inputs are taken to be as fast.
FP8_PEAK = 1979.0
FP8_PROJECTIONS = {(2112, 7168): 1058.0, (24576, 1536): 990.0, (32768, 512): 590.0, (7168, 16384): 1358.0}
FP8_UP_PROJECTIONS = {shape: FP8_PROJECTIONS[shape] for shape in ((24576, 1536), (32768, 512))}
FP8_DENSE = {(4096, 7168): 1304.0, (7168, 2048): 1025.0}
FP8_EXPERTS = {(4096, 7168): 1297.0, (7168, 2048): 1099.0}
# Weight gradients, (M, N) at 4,096 tokens, and of four experts with 8,192 each: DeepGEMM's kernels of May 2025, which
# add to sums in FP32. They are "~20%" faster than what DeepSeek had before (its pull request 95; experts as quoted in
# its issue 107).
FP8_PROJECTION_GRADIENTS = {(7168, 2112): 920.0, (1536, 24576): 986.0, (512, 32768): 878.0, (16384, 7168): 994.0}
FP8_DENSE_GRADIENTS = {(7168, 4096): 942.0, (2048, 7168): 920.0}
FP8_EXPERT_GRADIENTS = {(7168, 4096): 1044.0, (2048, 7168): 1033.0}
_GRADIENTS_SPED_UP = 1.2


def _together(rates: dict[tuple[int, int], float]) -> float:
    """Share of the FP8 peak when all shapes are multiplied one after another."""
    work = {shape: shape[0] * shape[1] for shape in rates}
    return sum(work.values()) / sum(work[shape] / rate for shape, rate in rates.items()) / FP8_PEAK


# Products, and those of weight gradients.
FP8_PROJECTION_SHARES = _together(FP8_PROJECTIONS), _together(FP8_PROJECTION_GRADIENTS) / _GRADIENTS_SPED_UP
FP8_UP_PROJECTION_SHARE = _together(FP8_UP_PROJECTIONS)
FP8_DENSE_SHARES = _together(FP8_DENSE), _together(FP8_DENSE_GRADIENTS) / _GRADIENTS_SPED_UP
FP8_EXPERT_SHARES = _together(FP8_EXPERTS), _together(FP8_EXPERT_GRADIENTS) / _GRADIENTS_SPED_UP
# 780 TFLOP/s of 989 in BF16, 4224 x 8192 x 2048 on an H100 (gist Chillee/2ec89696db8b7ed1c24461159e325405). FP32 (the
# router) is assumed to reach the same share.
BF16_SHARE = 780.2 / 989
# Experts in BF16: 651 TFLOP/s for 8 of 4096 x 768 x 2048 and 637 for 16 of 2048 x 768 x 2048, grouped by CUTLASS on an
# H100 (NVIDIA/TransformerEngine, pull request 2045).
BF16_EXPERT_SHARE = (650.574 + 636.927) / 2 / 989
# Attention, causal, 16 bits, 4,096 tokens, on an H100: forward and backward. FlashAttention-3 in BF16, 4 x 48 heads of
# 128: 1,236.9 and 4,643.5 us (meta-pytorch/tritonbench, pull request 1267). FlashAttention-2: forward 319 TFLOP/s with
# heads of 128 and 293 with 256; backward 310 with 128, not causal, which is no slower (arXiv 2407.08608, figures 5 and
# 6, read in transcriptions).
AttentionKernel = Literal["flash_attention_2", "flash_attention_3"]
_ATTENTION_FLOPS = 2 * 4 * 48 * 4096**2 * 128
ATTENTION_SHARES: dict[AttentionKernel, tuple[float, float]] = {
    "flash_attention_2": (319 / 989, 310 / 989),
    "flash_attention_3": (_ATTENTION_FLOPS / 1236.90e-6 / 989e12, 2.5 * _ATTENTION_FLOPS / 4643.46e-6 / 989e12),
}
# The kernel of heads whose queries are wider than their values (MLA, 192 and 128): DeepSeek-V2 had "an improved version
# of FlashAttention-2" (arXiv 2405.04434, section 3.1.3), V3's report names none. FlashAttention-3 took such heads in
# February 2025, their backward in April with values padded (Dao-AILab/flash-attention, issue 1487, pull request 1604).
# FlashAttention-2's heads of 192 are taken to lie between those of 128 and 256, its improvement to spare the padding.
WIDE_QUERIES_KERNEL: AttentionKernel = "flash_attention_2"
WIDE_QUERIES_SLOWER = {"flash_attention_2": (319 + 293) / 2 / 319, "flash_attention_3": 1.0}  # forward
PADS_VALUES = {"flash_attention_2": False, "flash_attention_3": True}  # backward
# 2,668 GB/s of 3,350 where a product waits for memory (DeepGEMM, the same table).
MEMORY_SHARE = 2668 / 3350
# All-to-all on H800: 153 GB/s of 200 within a node; over eight nodes 46 of 50 to experts and 45 back (DeepEP, README of
# February 2025, normal kernels, 4,096 tokens of 7,168, FP8 dispatch, BF16 combine). Collectives are taken to reach the
# same.
IN_NODE_SHARE = 153 / 200
BETWEEN_NODES_SHARE = 45 / 50
# Multiprocessors that work for the all-to-all while it is hidden (arXiv 2412.19437, section 3.2.2).
LENT_MULTIPROCESSORS = 20 / 132

SOURCES = (
    "FP8 products: DeepGEMM on H800, README of 2025-02; weight gradients: before its pull request 95",
    "BF16 products: Chillee's H100 matmul gist (780 TFLOP/s); of experts: TransformerEngine, pull request 2045",
    "attention: FlashAttention-2 (MLA; arXiv 2407.08608) or -3 (tritonbench pull request 1267) on H100",
    "device memory: DeepGEMM on H800 (2,668 GB/s)",
    "all-to-all: DeepEP on H800, README of 2025-02 (153 GB/s in a node, 45 GB/s between nodes)",
    "multiprocessors lent to communication: arXiv 2412.19437, section 3.2.2 (20 of 132)",
    "bubbles: arXiv 2412.19437, table 2; chunks that overlap nothing: deepseek-ai/DualPipe",
)
