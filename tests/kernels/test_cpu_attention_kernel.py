"""Attention in C, from projections as they lie: against float64 and torch's operations, and on any number of cores."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import allowed, drawn, error, floor
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moe_train.config import GQAConfig, MLAConfig
from moe_train.kernels.cpu import library
from moe_train.kernels.cpu.attention import CausalAttention, takes
from moe_train.model import cpu_attention
from moe_train.model.attention import GQA, MLA
from moe_train.model.rope import rotary_tables, rotate

pytestmark = pytest.mark.usefixtures("compiled_for_cpu")

SIZES = {  # sequences, heads, of keys, positions, features that stay, that turn, of a value, whether keys turn by head
    "tiny": (2, 8, 8, 256, 16, 16, 32, False),
    "a_row_too_many": (1, 2, 2, 133, 8, 8, 16, False),
    "no_multiples_of_a_register": (2, 3, 3, 67, 6, 34, 18, False),
    "many_to_shared_keys": (2, 4, 2, 100, 6, 10, 8, False),
    "all_turns": (2, 8, 2, 150, 0, 16, 16, True),
    "one_key_value_head": (1, 4, 1, 70, 0, 48, 64, True),
    "a_part_of_each_turns": (1, 6, 3, 200, 40, 100, 66, True),
    "two_positions": (1, 1, 1, 2, 0, 2, 2, True),
    "long": (1, 1, 1, 1500, 16, 16, 32, False),
}


def projected(b: int, h: int, g: int, t: int, n: int, m: int, w: int, own: bool) -> SimpleNamespace:
    """Queries, keys and values, rotary keys between others' features, and the gradient of the result."""
    widths = h * (n + m), g * (n + w), 6 + (g * m if own else m), h * w
    q, kv, rotary, grad = (drawn(b, t, width, seed=seed).bfloat16() for seed, width in enumerate(widths))
    turn = rotary_tables(torch.arange(t), 1e4 ** (-torch.arange(0, m, 2) / m))
    return SimpleNamespace(q=q, kv=kv, rotary=rotary[..., 6:], grad=grad, turn=turn, h=h, g=g, n=n, m=m, w=w)


def attended(case: SimpleNamespace, kind: str) -> list[Tensor]:
    """Result and the gradients of q, kv and rotary keys."""
    wide = [x.double() if kind == "float64" else x for x in (case.q, case.kv, case.rotary)]
    leaves, sizes = [x.detach().requires_grad_() for x in wide], (case.h, case.g)
    if kind == "kernels":
        assert takes(*leaves, case.turn, *sizes)
        out = CausalAttention.apply(*leaves, *case.turn, *sizes, 0.3)
    else:
        by_head = [x.unflatten(-1, (count, -1)).transpose(1, 2) for x, count in zip(leaves, sizes)]
        q, kv = (x.split((case.n, x.shape[-1] - case.n), dim=-1) for x in by_head)
        rotary = leaves[2].unflatten(-1, (-1, case.m)).transpose(1, 2)
        turned = [rotate(x, *case.turn) for x in (q[1], rotary)]
        q, k = torch.cat((q[0], turned[0]), -1), torch.cat((kv[0], turned[1].expand(-1, case.g, -1, -1)), -1)
        if kind == "float64":
            out = F.scaled_dot_product_attention(q, k, kv[1], is_causal=True, scale=0.3, enable_gqa=True)
        else:
            out = cpu_attention.CausalAttention.apply(q, k, kv[1], 0.3)
        out = out.transpose(1, 2).flatten(2)
    return [out.detach(), *torch.autograd.grad(out, leaves, case.grad.to(out.dtype))]


@pytest.mark.parametrize("name", SIZES)
def test_attention_is_nearer_to_float64_than_torchs_operations(name: str) -> None:
    case = projected(*SIZES[name])
    exact, torchs, found = (attended(case, kind) for kind in ("float64", "torch", "kernels"))
    for each, other, right in zip(found, torchs, exact, strict=True):
        assert each.dtype == torch.bfloat16
        assert each.shape == right.shape
        assert error(each, right) <= allowed(other, right)


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2)),
    st.integers(2, 140),
    st.tuples(st.integers(0, 20), st.integers(1, 20), st.integers(1, 40)),
    st.booleans(),
)
def test_attention_of_any_even_size(many: tuple[int, ...], t: int, halves: tuple[int, ...], own: bool) -> None:
    batch, groups, shared = many
    case = projected(batch, groups * shared, groups, t, *(2 * half for half in halves), own)
    for each, right in zip(attended(case, "kernels"), attended(case, "float64"), strict=True):
        assert error(each, right) < floor(right)


def test_features_are_turned_to_the_bits_of_rope() -> None:
    case = projected(*SIZES["all_turns"])
    before = attended(case, "kernels")[0]
    turned = [rotate(x.unflatten(-1, (-1, case.m)).transpose(1, 2), *case.turn) for x in (case.q, case.rotary)]
    q, keys = (x.transpose(1, 2).flatten(2) for x in turned)
    assert torch.equal(before, CausalAttention.apply(q, case.kv, keys, None, None, case.h, case.g, 0.3))


def test_sizes_that_do_not_go_together_are_refused() -> None:
    """Left to torch, which refuses them or can do them; the kernel would read what is beside a tensor."""
    case = projected(1, 4, 2, 8, 2, 4, 6, True)
    q, kv, rotary, turn = case.q, case.kv, case.rotary, case.turn
    assert takes(q, kv, rotary, turn, 4, 2)
    assert takes(q, kv, rotary[..., :4], turn, 4, 2)
    shorter = [x[:, :7] for x in (q, kv, rotary)]
    for others in [
        (shorter[0], kv, rotary, turn),
        (q, shorter[1], rotary, turn),
        (q, kv, shorter[2], turn),
        (*shorter, turn),
        (q[..., :-2], kv, rotary, turn),
        (q, kv[..., :-1], rotary, turn),
        (q, kv[..., :4], rotary, turn),
        (q, kv, rotary[..., :6], turn),
        (q.float(), kv, rotary, turn),
        (q, kv, rotary, (turn[0], turn[1].double())),
        (q[:, :1], kv[:, :1], rotary[:, :1], (turn[0][:1], turn[1][:1])),
    ]:
        assert not takes(*others, 4, 2)
    assert not takes(q, kv, rotary, turn, 3, 2)
    library.use("torch", in_bf16=True)
    try:
        assert not takes(q, kv, rotary, turn, 4, 2)
    finally:
        library.use("compiled", in_bf16=True)


def test_nothing_later_changes_a_result_or_a_gradient() -> None:
    before, after = projected(*SIZES["a_row_too_many"]), projected(*SIZES["a_row_too_many"])
    for x in (after.q, after.kv, after.rotary):
        x[:, 80:] += 5.0
    for case in (before, after):
        case.grad[:, 80:] = 0
    for one, other in zip(attended(before, "kernels"), attended(after, "kernels"), strict=True):
        assert torch.equal(one[:, :80], other[:, :80])


@pytest.mark.parametrize("name", SIZES)
def test_any_number_of_cores_gives_the_same_bits(name: str) -> None:
    case, found = projected(*SIZES[name]), []
    before = torch.get_num_threads()
    try:
        for cores in (1, 2, 3):
            torch.set_num_threads(cores)
            found.append(attended(case, "kernels"))
    finally:
        torch.set_num_threads(before)
    for each in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], each, strict=True))


def test_a_number_that_is_none_is_not_lost_and_stays_with_its_token() -> None:
    case = projected(*SIZES["tiny"])
    case.q[0, 100, 32 + 3] = torch.nan  # of the second head
    out = attended(case, "kernels")[0].unflatten(-1, (case.h, -1))
    assert out[0, 100, 1].isnan().all()
    out[0, 100, 1] = 0
    assert out.isfinite().all()


def test_second_derivatives_are_refused() -> None:
    case = projected(1, 1, 1, 8, 0, 4, 4, True)
    leaves = [x.detach().requires_grad_() for x in (case.q, case.kv, case.rotary)]
    y = CausalAttention.apply(*leaves, *case.turn, 1, 1, 0.5)
    (gradient,) = torch.autograd.grad(y.float().square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(gradient.sum(), leaves[0])


MLA_OF_NANO = MLAConfig("mla", 4, 32, None, 16, 8, 16)
GQA_OF_NANO = GQAConfig("gqa", 4, 2, 16, None)
MODULES = {
    "mla": lambda: MLA(MLA_OF_NANO, 64, 1e-6, 0.2),
    "gqa": lambda: GQA(GQA_OF_NANO, 64, 1e-6, 0.25),
    "gqa_normed": lambda: GQA(GQAConfig("gqa", 4, 2, 16, "per_head"), 64, 1e-6, 0.25),
}


def trained(name: str, kernels: str) -> tuple[list[Tensor], int]:
    """A module's result and gradients, of x and of its weights in order, and the FLOPs that torch counts."""
    module = MODULES[name]()
    for seed, weight in enumerate(module.parameters()):
        weight.data = drawn(*weight.shape, seed=seed, scale=0.2) if weight.ndim == 2 else weight.data
    x, grad = drawn(2, 90, 64, seed=50).requires_grad_(), drawn(2, 90, 64, seed=51)
    features = 8 if name == "mla" else 16
    turn = rotary_tables(torch.arange(90), 1e4 ** (-torch.arange(0, features, 2) / features))
    library.use("compiled" if kernels == "compiled" else "torch", in_bf16=True)
    try:
        with FlopCounterMode(display=False) as counter:
            with torch.autocast("cpu", torch.bfloat16, enabled=kernels != "wide"):
                y = module(x, turn)
            y.backward(grad.to(y.dtype))
    finally:
        library.use("compiled", in_bf16=True)
    return [y.detach(), x.grad, *(weight.grad for weight in module.parameters())], counter.get_total_flops()


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_what_they_are_with_torchs_operations(name: str) -> None:
    (exact, _), (torchs, _), (found, flops) = (trained(name, kind) for kind in ("wide", "torch", "compiled"))
    for each, other, right in zip(found, torchs, exact, strict=True):
        assert error(each, right.double()) <= allowed(other, right.double())
    tokens, scores, features = 2 * 90, 2 * 4 * 90 * 90, (24, 16) if name == "mla" else (16, 16)
    weights = sum(weight.numel() for weight in MODULES[name]().parameters() if weight.ndim == 2)
    assert flops == 6 * tokens * weights + 2 * scores * (4 * features[0] + 3 * features[1])


def test_a_module_keeps_projections_as_they_are_and_nothing_else() -> None:
    """Inputs of products, of which one is the result, and three projections in BF16: no joined or turned copy."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    module, weights = MODULES["mla"](), 0
    turn = rotary_tables(torch.arange(90), 1e4 ** (-torch.arange(0, 8, 2) / 8))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        module(torch.ones(2, 90, 64), turn)
    weights = sum(weight.nbytes for weight in module.parameters())
    tables = sum(x.nbytes for x in turn)
    latent = 2 * 32  # normed
    features = 2 * (64 + 4 * 24 + (32 + 8) + 4 * 32 + 4 * 16) + latent
    assert sum(kept.values()) == weights + tables + 2 * 90 * features
