"""Whose operations a step is made of, as far as its tensors depend on that.

torch's operations make, keep and copy what the project's kernels read where it lies or never write: FP32 norms beside
their rounded forms, rows of tokens once for every expert, heads that are split, turned and joined, casts of weights.
What differs is asked of `Circumstances` (layer_tape.py) by what it is, and answered there for each of the three.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal

DeviceType = Literal["cpu", "cuda"]


class Kernels(Enum):
    TORCH = "torch"
    COMPILED = "compiled"  # kernels/cpu, in C: of a CPU in BF16
    TRITON = "triton"  # kernels/*.py: of a GPU of compute capability 8.0 and later

    @classmethod
    def usual(cls, device_type: DeviceType) -> Kernels:
        """Of a device that is not at hand: those that any GPU of today takes; a CPU may lack what C kernels ask for."""
        return cls.TRITON if device_type == "cuda" else cls.TORCH


# kernels/cpu: a linear layer of no more weights, and a SwiGLU of no more, has gradients of its own for each part of the
# rows, added up in the end (linear.py, experts.py); matrices of no more elements are Muon's without copies (muon.py).
MOST_IN_PARTS, MOST_IN_ONE_KERNEL, MOST_OF_A_MATRIX = 2**18, 2**20, 2**18


def parts(rows: int) -> int:
    """Of the rows, as kernels/cpu/library.py cuts them."""
    return min(16, max(8, rows // 1024))
