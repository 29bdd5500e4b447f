"""Tokens on their way to experts in FP8: what is computed is that of one process that rounds them as much."""

from __future__ import annotations

import pytest
import torch
from spread_cases import Results
from test_layouts_agree import assert_same

from moe_train.parallel.packed_rows import OPERAND, packed, unpacked
from moe_train.precision.quantize import quantize

pytestmark = pytest.mark.xdist_group("spread")


@pytest.mark.parametrize("case", ["rounded/ep", "rounded crowded/ep", "rounded crowded/ep_fsdp2"])
def test_it_is_what_one_process_computes_with_the_same_rounding(spread_results: Results, case: str) -> None:
    one, other = spread_results[f"{case.split('/')[0]}/single"], spread_results[case]
    assert_same(one, other, 1e-9, 1e-6)


@pytest.mark.parametrize("kind", ["rounded bf16", "rounded fp8"])
def test_so_it_is_with_products_in_bf16_and_in_fp8(spread_results: Results, kind: str) -> None:
    one, other = (torch.tensor(spread_results[f"{kind}/{name}"]["losses"])[:, 0] for name in ("single", "ep_fsdp2"))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [32, 128, 200])
def test_rows_come_out_as_the_recipe_rounds_them_and_are_not_rounded_twice(dtype: torch.dtype, width: int) -> None:
    rows = torch.randn(7, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[3] = 0.0
    sent = packed(rows)
    assert sent.shape == (7, width + 4 * -(-width // 128))
    arrived = unpacked(sent, width, dtype)
    assert torch.equal(arrived, quantize(rows, OPERAND).dequantized().to(dtype))
    assert torch.equal(unpacked(packed(arrived), width, dtype), arrived)
    assert arrived.dtype == dtype


def test_no_rows_are_no_bytes() -> None:
    assert packed(torch.empty(0, 200)).shape == (0, 208)
    assert unpacked(packed(torch.empty(0, 200)), 200, torch.float32).shape == (0, 200)
