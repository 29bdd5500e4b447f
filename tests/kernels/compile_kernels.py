"""Compile what the wrappers launch for a compute capability, without its GPU: python compile_kernels.py 9 0

For 9.0 all of it, for others what multiplies or rounds to FP8.

Prints a line of JSON a kernel: its name, the shared memory it needs, how many of its programs find registers on a core,
the bytes a thread keeps outside of these, and the instructions of interest it has.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from moe_train.config import OperandConfig
from moe_train.kernels import (
    adamw,
    capability,
    collect,
    dequantize,
    fp8_matmul,
    grouped_hopper,
    grouped_matmul,
    head,
    heads,
    muon,
    newton_schulz,
    norm,
    quantize,
    rounding,
    routing,
    sums,
    swiglu,
)
from moe_train.kernels.layouts import Columns, Rows, Weights

INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "cvt.rn.satfinite.e4m3x2.f32", "div.rn.f32", "e4m3")
INSTRUCTIONS += ("cp.async.bulk.tensor",)
REGISTERS = 65_536  # of a core
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
run = JITFunction.run


class Driver:
    """What Triton asks of a device."""

    def __init__(self, major: int, minor: int) -> None:
        self.target = GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes that it keeps in memory for want of them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", found)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    return registers, stack


def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
    registers, spilled = usage(compiled.asm["cubin"])
    said = {
        "kernel": self.fn.__name__,
        "shared": compiled.metadata.shared,
        "beside_each_other": REGISTERS // (registers * 32 * compiled.metadata.num_warps),
        "spilled": spilled,
        "instructions": [name for name in INSTRUCTIONS if name in compiled.asm["ptx"]],
    }
    print(json.dumps(said))


N, K = 1024, 256  # sizes that are whole blocks


def fp8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8).view(torch.float8_e4m3fn)


def launch_products() -> None:
    """Those that multiply or round to FP8: what a device can do decides what they become."""
    o, e = 512, 4
    ends_e = torch.arange(1, e + 1, dtype=torch.int32) * (N // e)
    x, w = torch.zeros(N, K, dtype=torch.bfloat16), torch.zeros(e, o, K, dtype=torch.bfloat16)
    tile = OperandConfig("e4m3", "tile", False)
    quantize.quantize(x, ends_e, rows=tile, columns=tile)
    weights = Weights(fp8(e, o, K), torch.zeros(e, o, K // 128), shared_rows=True)
    fp8_matmul.grouped_product(Rows(fp8(N, K), torch.zeros(N, K // 128)), weights, ends_e, torch.bfloat16)
    pieces = N // 128 + e
    columns = Columns(fp8(K, 128 * pieces), torch.zeros(pieces, K).t(), ends_e)
    fp8_matmul.grouped_weight_product(columns, columns)
    source, rows = torch.zeros(N, dtype=torch.int64), Rows(fp8(N // 2, K), torch.zeros(N // 2, K // 128))
    quantize.quantize_tokens(x[: N // 2], source, ends_e, rows=tile, columns=tile)
    quantize.quantize_tokens_again(rows, source, ends_e, tile)
    fp8_matmul.grouped_product(rows, weights, ends_e, torch.bfloat16, source)
    grouped_matmul.grouped_product(x, w, ends_e)
    grouped_matmul.grouped_weight_product(x, x, ends_e)
    grouped_matmul.grouped_product(x[: N // 2], w, ends_e, source)
    grouped_matmul.grouped_weight_product(x, x[: N // 2], ends_e, right_source_n=source)
    grouped_matmul.grouped_weight_product(x[: N // 2], x, ends_e, left_source_n=source)
    gate, dh = torch.zeros(N, 1, dtype=torch.bfloat16), torch.zeros(N, K // 2, dtype=torch.bfloat16)
    swiglu.swiglu_quantize(x, gate, ends_e, tile)
    swiglu.swiglu_backward_quantize(dh, x, gate, ends_e, rows=tile, columns=tile)
    for sides in ((96, 128), (64, 128)):
        stacks = (newton_schulz.Stack(0, 4, *sides),)
        newton_schulz.orthogonalize_(torch.zeros(N * K).bfloat16(), stacks, 5, (3.4445, -4.7750, 2.0315), 1e-7)


def launch_hopper_products() -> None:
    ends_e, source = torch.zeros(4, dtype=torch.int32), torch.zeros(N, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float16):
        x, w = torch.zeros(N, K, dtype=dtype), torch.zeros(4, 512, K, dtype=dtype)
        for index in (None, source):
            for weights in (w, w.mT.contiguous().mT):
                grouped_matmul.grouped_product(x, weights, ends_e, index)
        grouped_matmul.grouped_weight_product(x, x, ends_e, right_source_n=source)
        grouped_matmul.grouped_weight_product(x, x, ends_e, left_source_n=source)


def launch_rest() -> None:
    """Those that are the same for every device."""
    x, source = torch.zeros(N, K, dtype=torch.bfloat16), torch.zeros(N, dtype=torch.int64)
    collect.collect(x, source.view(-1, 4), x[: N // 4])
    gate, dh = torch.zeros(N, 1, dtype=torch.bfloat16), torch.zeros(N, K // 2, dtype=torch.bfloat16)
    swiglu.swiglu(x, gate)
    swiglu.swiglu_backward_and_forward(dh, x, gate)
    dequantize.dequantize(Rows(fp8(N, K), torch.zeros(N, K // 128)), torch.bfloat16)
    of_heads = [torch.zeros(2, 64, c, dtype=torch.bfloat16, requires_grad=True) for c in (16 * 64, 16 * 96, 32)]
    made = heads.LatentHeads.apply(*of_heads, torch.zeros(64, 32), torch.zeros(64, 32), 16)
    torch.autograd.grad(made, of_heads, [torch.zeros_like(each) for each in made])
    head.cross_entropy_(x, torch.zeros(N, dtype=torch.int64), 0.0, -100, gradient=True)
    wide, scale, weight = torch.zeros(N, K), torch.zeros(N), torch.zeros(K)
    norm.norm_rows(wide, x, weight, scale, eps=1e-6, total=wide, narrow=x, exact=wide)
    norm.norm_rows(wide, None, weight, scale, eps=None, total=None, narrow=x, exact=None)
    grads = {"along": wide, "grad_narrow": x, "grad_exact": wide}
    norm.norm_rows_backward(wide, weight, scale, **grads, grad_x=wide, grad_added=x)
    logits, real, expert = torch.zeros(N, 96), torch.ones(2, N // 2, dtype=torch.bool), torch.zeros(N, 6).long()
    gating = routing.Gating(6, normalised=True, scaled=2.5, loss_weight=1e-4)
    routing.choose_experts(logits, logits[0], real, gating)
    routing.choice_gradient(logits, real, expert, logits[:2], gating, torch.zeros(N, 6), torch.zeros(()))
    routing.sort_by_expert(expert, real.flatten(), 96)
    matrices = muon.Matrices.of([wide], [wide], [wide], [1.0])
    matrices.direct(x, 0.9, True, torch.ones(()))
    matrices.update(x, torch.zeros(1), 0.1)
    sums.sum_of(torch.zeros(8, N), torch.float32)
    sums.sum_of(torch.zeros(N, 128), torch.bfloat16)
    for moment in (wide, x):
        operands = [[tensor] for tensor in (wide, wide, moment, moment, torch.zeros(()))]
        adamw.step(*operands, rate=torch.zeros(()), betas=(0.9, 0.95), eps=1e-8, decay=0.1, coefficient=torch.ones(()))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    major, minor = int(sys.argv[1]), int(sys.argv[2])
    triton.runtime.driver.set_active(Driver(major, minor))
    card = capability.of_capability((major, minor))
    for module in (rounding, fp8_matmul, grouped_matmul, newton_schulz):
        module.card = lambda _: card  # type: ignore[attr-defined]
    JITFunction.run = compile_only
    launch_products()
    if major == 9:
        grouped_hopper.card = lambda _: card
        launch_hopper_products()
        launch_rest()
