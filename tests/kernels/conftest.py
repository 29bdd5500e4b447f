"""Kernels run interpreted on a CPU, at sizes that take seconds, and on a CUDA device (-m gpu) at realistic ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from taken_kernels import skip_without_c_kernels
from torch import Tensor

from moe_train.kernels.cpu import library


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    triton = pytest.importorskip("triton")
    if request.param == "cuda":
        return torch.device("cuda")
    if not triton.knobs.runtime.interpret:
        pytest.skip("kernels are compiled where there is a CUDA device: run with  -m gpu")
    return torch.device("cpu")


@pytest.fixture
def ragged(device: torch.device) -> tuple[int, Tensor]:
    """n rows and where their groups end: empty ones first, in the middle and last, and rows behind the last."""
    sizes = [0, 130, 0, 5, 128, 0] if device.type == "cpu" else [0, 1300, 0, 5, 128, 4000, 77, 2048, 0]
    ends_e = torch.tensor(sizes, device=device).cumsum(0, dtype=torch.int32)
    return sum(sizes) + 10, ends_e


@pytest.fixture
def random(device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return make


@pytest.fixture(scope="module")
def compiled_for_cpu() -> Iterator[None]:
    """The kernels in C, used by all that a module's tests call. Sources that do not compile are a failure."""
    skip_without_c_kernels()
    library.use("compiled", in_bf16=True)
    yield
    library.use("torch", in_bf16=True)
