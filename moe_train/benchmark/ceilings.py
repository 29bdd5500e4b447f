"""What the device can do at best, measured in the same run as what is held against it.

Printed peaks are for clocks that a loaded device does not keep, and a shared CPU has none at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_train.benchmark.figures import Estimate, estimate
from moe_train.benchmark.timing import Call, interleaved
from moe_train.cost.peak import measured_matmul_tflops

_COPIED_BYTES = {"cpu": 2**26, "cuda": 2**30}  # far above the caches


@dataclass(frozen=True)
class Ceilings:
    """`matmul` in TFLOP/s of a large square product, `copy` in GB/s read and written."""

    dtype: str
    matmul: Estimate
    copy: Estimate
    products: dict[str, Estimate]  # TFLOP/s of single products of the sizes a model has, by their sizes


def square_matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The fastest of the products that fit into a fifth of a second."""
    return measured_matmul_tflops(device, dtype, seconds=0.2)


def product(device: torch.device, dtype: torch.dtype, m: int, k: int, n: int) -> Call:
    """A call that multiplies (m, k) by the transpose of (n, k), as a linear layer does."""
    a, b = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
    return lambda: torch.mm(a, b.t())


def copying(device: torch.device) -> tuple[Call, int]:
    """A call that copies a large tensor, and the bytes it reads and writes."""
    size = _COPIED_BYTES[device.type]
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size


def measure(
    device: torch.device, dtype: torch.dtype, sizes: Sequence[tuple[int, int, int]], *, rounds: int
) -> Ceilings:
    """`sizes` (m, k, n) are those of the products that matter to a model, in the compute format `dtype`."""
    copy, moved = copying(device)
    arms = {f"{m} × {k} × {n}": product(device, dtype, m, k, n) for m, k, n in sizes}
    squares = []

    def square() -> None:
        squares.append(square_matmul_tflops(device, dtype))

    found = interleaved({"square": square, "copy": copy, **arms}, device, rounds=rounds, shortest_seconds=0.05)
    flops = {f"{m} × {k} × {n}": 2.0 * m * k * n for m, k, n in sizes}
    return Ceilings(
        dtype=str(dtype).removeprefix("torch."),
        matmul=estimate(squares[2:]),  # the first two warm up
        copy=estimate([moved / s / 1e9 for s in found["copy"]]),
        products={name: estimate([flops[name] / s / 1e12 for s in found[name]]) for name in arms},
    )


DRIFT = 0.15  # between two measurements of the same device: on an H200 and on quiet cores they differ by a few percent


def drift(before: Ceilings, after: Ceilings) -> str | None:
    """What is said where products ran at another speed after the figures than before them.

    Copies say nothing: what fits into a cache that others use as well runs twice as fast on some days.
    """
    rates = before.matmul.value, after.matmul.value
    if max(rates) <= (1 + DRIFT) * min(rates):
        return None
    return f"the device multiplied at {rates[0]:.3g} TFLOP/s before it and at {rates[1]:.3g} after it"
