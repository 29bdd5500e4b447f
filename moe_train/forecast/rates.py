"""What others measured of each kind of work, as shares of what the device is rated at: nothing here is fitted.

They carry a prediction from parts (`parts.py`) from a device's data sheet to what kernels reach on it. All are of
Hopper; on other devices the same shares are taken. None was derived from how long a training run took.
"""

from __future__ import annotations

# TFLOP/s of FP8 products in DeepSeek-V3's shapes on an H800: (N, K) at M = 4096, and of four experts with 8,192 rows
# each (DeepGEMM, README of February 2025; read in copies). Weight gradients, of other shape, are taken to be as fast.
FP8_PEAK = 1979.0
FP8_PROJECTIONS = {(2112, 7168): 1058.0, (24576, 1536): 990.0, (32768, 512): 590.0, (7168, 16384): 1358.0}
FP8_EXPERTS = {(4096, 7168): 1297.0, (7168, 2048): 1099.0}


def _together(rates: dict[tuple[int, int], float]) -> float:
    """Share of the FP8 peak when all shapes are multiplied one after another."""
    work = {shape: shape[0] * shape[1] for shape in rates}
    return sum(work.values()) / sum(work[shape] / rate for shape, rate in rates.items()) / FP8_PEAK


FP8_PROJECTION_SHARE = _together(FP8_PROJECTIONS)
FP8_EXPERT_SHARE = _together(FP8_EXPERTS)
# 780 TFLOP/s of 989 in BF16, 4224 x 8192 x 2048 on an H100 (gist Chillee/2ec89696db8b7ed1c24461159e325405). FP32 (the
# router) is assumed to reach the same share.
BF16_SHARE = 780.2 / 989
# FlashAttention-3 on an H100, causal, BF16, 4 x 48 heads of 128, 4,096 tokens: 1,236.9 us forward, 4,643.5 us backward
# (meta-pytorch/tritonbench, pull request 1267); backward is 2.5 times the FLOPs of forward, scores being made again.
_ATTENTION_FLOPS = 2 * 4 * 48 * 4096**2 * 128
ATTENTION_FORWARD_SHARE = _ATTENTION_FLOPS / 1236.90e-6 / 989e12
ATTENTION_BACKWARD_SHARE = 2.5 * _ATTENTION_FLOPS / 4643.46e-6 / 989e12
ATTENTION_BACKWARD_WORK = 2.5
# 2,668 GB/s of 3,350 where a product waits for memory (DeepGEMM, the same table).
MEMORY_SHARE = 2668 / 3350
# All-to-all on H800: 153 GB/s of 200 within a node, 50 of 50 over eight nodes (DeepEP V1, normal kernels, 4,096 tokens
# of 7,168, FP8 dispatch, BF16 combine). Collectives are taken to reach the same.
IN_NODE_SHARE = 153 / 200
BETWEEN_NODES_SHARE = 50 / 50
# Multiprocessors that work for the all-to-all while it is hidden (arXiv 2412.19437, section 3.2.2).
LENT_MULTIPROCESSORS = 20 / 132

SOURCES = (
    "FP8 products: DeepGEMM on H800, README of 2025-02",
    "BF16 products: Chillee's H100 matmul gist (780 TFLOP/s)",
    "attention: FlashAttention-3 on H100, tritonbench pull request 1267",
    "device memory: DeepGEMM on H800 (2,668 GB/s)",
    "all-to-all: DeepEP V1 on H800 (153 GB/s in a node, 50 GB/s between nodes)",
    "multiprocessors lent to communication: arXiv 2412.19437, section 3.2.2 (20 of 132)",
    "bubbles: arXiv 2412.19437, table 2",
)
