"""What Triton makes of the kernels for GPUs that are not here: it compiles, fits, and uses the hardware there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from moe_train.kernels.capability import of_capability

SCRIPT = Path(__file__).with_name("compile_kernels.py")


PRODUCTS = {"_grouped_product_kernel", "_weight_kernel"}
MULTIPLIES_WITH = {
    **dict.fromkeys([(8, 0), (8, 6), (8, 9), (12, 0)], "mma.sync"),
    (9, 0): "wgmma.mma_async",
    (10, 0): "tcgen05.mma",
}


@pytest.mark.parametrize(("major", "minor"), MULTIPLIES_WITH)
def test_kernels_compile_and_fit_beside_a_core(major: int, minor: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(SCRIPT), str(major), str(minor)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    card, product = of_capability((major, minor)), MULTIPLIES_WITH[major, minor]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({kernel["kernel"] for kernel in kernels}) == (28 if major == 9 else 7)  # of different names
    for kernel in kernels:
        assert kernel["shared"] <= card.shared_bytes, kernel
        whole = kernel["kernel"] == "_orthogonalize_kernel"  # matrices stay in registers: some do not find place
        assert kernel["spilled"] <= (64 if whole else 16), kernel  # bytes a thread
        multiplies = whole or kernel["kernel"].endswith(("_product_kernel", "_weight_kernel"))
        assert (product in kernel["instructions"]) == multiplies
        descriptors = kernel["kernel"].startswith("_descriptor_")
        assert ("cp.async.bulk.tensor" in kernel["instructions"]) == descriptors
        assert not (descriptors and kernel["spilled"]), kernel
        assert card.multiplies_fp8 or "e4m3" not in kernel["instructions"]
        if kernel["kernel"].endswith("_quantize_kernel"):
            assert "div.rn.f32" in kernel["instructions"]  # rounded as the reference rounds it
            assert kernel["beside_each_other"] >= 3, kernel  # some compute while others wait for memory
            assert ("cvt.rn.satfinite.e4m3x2.f32" in kernel["instructions"]) == card.rounds_fp8
