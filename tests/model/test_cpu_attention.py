"""Attention in BF16 on a CPU: against float64, in tiles of any size, and blind to what is later."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.model import cpu_attention
from moe_train.model.attention import causal_attention

FLOOR_DB = 48.0  # torch's fused kernel has 44 to 55 on the same inputs

# batch, heads, key-value heads, length, features of keys and of values
SHAPES = {
    "one_tile": (2, 4, 4, 48, 16, 16),
    "a_row_too_many": (1, 2, 2, 129, 16, 16),
    "smaller_values": (2, 2, 2, 100, 24, 16),
    "shared_keys": (2, 8, 2, 150, 16, 16),
    "one_key_value_head": (1, 4, 1, 70, 16, 8),
    "two_positions": (1, 1, 1, 2, 8, 8),
}


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values by tokens as projections make them, and a gradient of the result."""
    b, h, g, t, c, cv = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(h, c), (g, c), (g, cv), (h, cv)]
    drawn = [torch.randn(b, t, *size, generator=generator).transpose(1, 2).bfloat16() for size in sizes]
    return drawn[0] * 3, drawn[1], drawn[2], drawn[3]


def noise_db(found: Tensor, expected: Tensor) -> float:
    """Signal over noise."""
    signal, error = expected.detach(), found.detach().double() - expected.detach()
    return float(10 * torch.log10(signal.square().sum() / error.square().sum()))


@pytest.mark.parametrize("scores", [1, 2**19], ids=["a_head_a_tile", "all_heads_in_a_tile"])
@pytest.mark.parametrize("name", SHAPES)
def test_results_and_gradients_are_those_of_float64(name: str, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "_SCORES", scores)
    q, k, v, grad = (x.requires_grad_() for x in inputs(SHAPES[name]))
    out = causal_attention(q, k, v, 0.3, grouped=True)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*wide, is_causal=True, scale=0.3, enable_gqa=True)
    assert out.dtype == torch.bfloat16
    assert noise_db(out, expected) > FLOOR_DB
    found = torch.autograd.grad(out, (q, k, v), grad)
    for each, right in zip(found, torch.autograd.grad(expected, wide, grad.double())):
        assert noise_db(each, right) > FLOOR_DB


def test_it_is_what_runs_in_bf16_and_keeps_no_scores() -> None:
    q, k, v, _ = inputs(SHAPES["a_row_too_many"])
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = causal_attention(q.requires_grad_(), k, v, 1.0)
    assert type(out.grad_fn).__name__ == "CausalAttentionBackward"
    assert sum(x.numel() for x in kept) == q.numel() + k.numel() + v.numel()


def test_nothing_later_changes_a_result_or_a_gradient() -> None:
    q, k, v, grad = inputs(SHAPES["a_row_too_many"])
    before, after = [], []
    for results, changed in ((before, 0.0), (after, 5.0)):
        later = [x.clone() for x in (q, k, v)]
        for x in later:
            x[:, :, 80:] += changed
            x.requires_grad_()
        out = causal_attention(*later, 1.0)
        results += [out, *torch.autograd.grad(out[:, :, :80], later, grad[:, :, :80])]
    for one, other in zip(before, after):
        assert torch.equal(one[:, :, :80], other[:, :, :80])


@pytest.mark.parametrize("name", SHAPES)
def test_cores_that_share_the_heads_give_the_bits_of_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "_ENOUGH", 0)
    usual, results = torch.get_num_threads(), []
    for cores in (1, 2, 3):
        torch.set_num_threads(cores)
        q, k, v, grad = (x.requires_grad_() for x in inputs(SHAPES[name]))
        out = causal_attention(q, k, v, 0.3, grouped=True)
        results.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    torch.set_num_threads(usual)
    assert all(torch.equal(one, other) for more in results[1:] for one, other in zip(results[0], more))
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"  # type: ignore[attr-defined]
