"""Heads in Triton against autograd in FP64 of the operations they replace, and the model with them and without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from kernel_checks import allowed, error

from moe_train.config import GQAConfig, MLAConfig
from moe_train.kernels import heads
from moe_train.model import attention
from moe_train.model.attention import GQA, MLA
from moe_train.model.rope import rotary_tables, rotate
from moe_train.precision.remade import remaking

Random = Callable[..., Tensor]
FORMATS = [torch.bfloat16, torch.float16, torch.float32]

# batch, length, heads, features that stay, that turn, of values: as `base` has them, and sizes that fill no block
LATENT = {
    "base": (2, 6, 16, 32, 32, 64),
    "ragged": (3, 7, 5, 12, 6, 20),
    "many_heads": (1, 3, 20, 3, 2, 5),
    "one_of_each": (1, 1, 1, 1, 2, 1),
}
# batch, length, heads, key-value heads, features
GROUPED = {"few_keys": (2, 9, 8, 2, 16), "ragged": (3, 5, 6, 3, 10), "many_heads": (1, 2, 36, 18, 4)}


def tables(t: int, turned: int, like: Tensor) -> tuple[Tensor, Tensor]:
    return rotary_tables(torch.arange(t, device=like.device), torch.linspace(0.3, 2.0, turned // 2, device=like.device))


def close(found: Tensor, exact: Tensor, terms: int = 1) -> None:
    """Within half a unit of its format, and FP32's error of sums of two products of so many terms."""
    relative = torch.finfo(found.dtype).eps / 2 + 1e-6
    torch.testing.assert_close(found.double(), exact, rtol=relative, atol=1e-6 * terms)


def spread(x: Tensor) -> Tensor:
    """The same numbers with others between rows: a gradient as attention may return it."""
    return torch.stack((x, x + 1), dim=2).flatten(2, 3)[:, :, ::2]


def with_gradients(
    function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], grads: list[Tensor]
) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    results = function(*inputs)
    return [*(x.detach() for x in results), *torch.autograd.grad(results, inputs, grads)]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", LATENT)
def test_of_latent_attention_they_are_those_of_fp64_rounded(name: str, dtype: torch.dtype, random: Random) -> None:
    b, t, h, n, m, w = LATENT[name]
    q, kv = random(b, t, h * (n + m), dtype=dtype), random(b, t, h * (n + w), dtype=dtype)
    rotary = random(b, t, m + 8, dtype=dtype)[..., 8:]  # the end of what one projection makes
    cos, sin = tables(t, m, q)
    grads = [random(b, h, t, n + m, dtype=dtype), spread(random(b, h, t, n + m, dtype=dtype))]
    grads.append(random(b, t, h, w, dtype=dtype).transpose(1, 2))

    def exactly(q: Tensor, kv: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_nope, q_rope = q.unflatten(2, (h, -1)).transpose(1, 2).split((n, m), dim=-1)
        k_nope, v = kv.unflatten(2, (h, -1)).transpose(1, 2).split((n, w), dim=-1)
        k_rope = rotate(rotary, cos, sin).unsqueeze(1).expand(-1, h, -1, -1)
        return torch.cat((q_nope, rotate(q_rope, cos, sin)), -1), torch.cat((k_nope, k_rope), -1), v

    found = with_gradients(lambda *x: heads.LatentHeads.apply(*x, cos, sin, h), [q, kv, rotary], grads)
    wide = [x.double() for x in (q, kv, rotary)]
    exact = with_gradients(exactly, wide, [x.double() for x in grads])
    for each, right in zip(found, exact):
        assert each.dtype == dtype
        close(each, right, terms=h)
    for made in found[:2]:
        assert made.transpose(1, 2).is_contiguous()  # so that the result of attention is, too
    assert found[2].untyped_storage().data_ptr() == kv.untyped_storage().data_ptr()
    again = with_gradients(lambda *x: heads.LatentHeads.apply(*x, cos, sin, h), [q, kv, rotary], grads)
    assert all(torch.equal(one, other) for one, other in zip(found, again))
    assert torch.equal(heads.shared_keys(kv, rotary, cos, sin, h, w), found[1])


@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize(("dtype", "out"), [*zip(FORMATS, FORMATS), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("name", GROUPED)
def test_of_grouped_attention_they_are_those_of_fp64_rounded(
    name: str, dtype: torch.dtype, out: torch.dtype, by_head: bool, random: Random
) -> None:
    b, t, h, g, c = GROUPED[name]

    def drawn(heads: int) -> Tensor:
        shape = (b, heads, t, c) if by_head else (b, t, heads, c)
        x = random(*shape, dtype=dtype)
        return x.transpose(1, 2) if by_head else x

    q, k = drawn(h), drawn(g)
    cos, sin = tables(t, c, q)
    grads = [spread(random(b, h, t, c, dtype=out)), random(b, t, g, c, dtype=out).transpose(1, 2)]
    found = with_gradients(lambda *x: heads.GroupedHeads.apply(*x, cos, sin, out), [q, k], grads)
    exact = with_gradients(
        lambda *x: tuple(rotate(each.transpose(1, 2), cos, sin) for each in x),
        [q.double(), k.double()],
        [x.double() for x in grads],
    )
    for each, right, format in zip(found, exact, (out, out, dtype, dtype)):
        assert each.dtype == format
        close(each, right)
    for made in found[:2]:
        assert made.transpose(1, 2).is_contiguous()


def test_no_tokens_and_gradients_that_are_not_there(random: Random) -> None:
    cos, sin = tables(0, 4, random(1))
    q, kv, rotary = (random(2, 0, c).requires_grad_() for c in (3 * 6, 3 * 7, 4))
    made = heads.LatentHeads.apply(q, kv, rotary, cos, sin, 3)
    assert [x.shape for x in made] == [(2, 3, 0, 6), (2, 3, 0, 6), (2, 3, 0, 5)]
    assert all(x.numel() == 0 for x in torch.autograd.grad(sum(x.sum() for x in made), (q, kv, rotary)))
    cos, sin = tables(4, 4, random(1))
    q, kv, rotary = (random(2, 4, c).requires_grad_() for c in (3 * 6, 3 * 7, 4))
    made = heads.LatentHeads.apply(q, kv, rotary, cos, sin, 3)
    d_q, d_kv, d_rotary = torch.autograd.grad(made[2].sum(), (q, kv, rotary))  # a gradient that is one number's view
    assert not torch.cat((d_q, d_rotary), dim=2).any()
    of_head = d_kv.unflatten(2, (3, 7))
    assert not of_head[..., :2].any()
    assert (of_head[..., 2:] == 1).all()


MLA_CONFIG = MLAConfig("mla", 4, 24, None, 8, 8, 16)
LAYERS: dict[str, Callable[[], MLA | GQA]] = {
    "mla": lambda: MLA(MLA_CONFIG, 32, 1e-6, 0.25),
    "gqa": lambda: GQA(GQAConfig("gqa", 4, 2, 16, None), 32, 1e-6, 0.25),
    "gqa_per_head": lambda: GQA(GQAConfig("gqa", 4, 2, 16, "per_head"), 32, 1e-6, 0.25),
    "gqa_all_heads": lambda: GQA(GQAConfig("gqa", 4, 4, 16, "all_heads"), 32, 1e-6, 0.25),
}


@pytest.mark.parametrize("in_bf16", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_the_same_with_them_as_without(
    name: str, in_bf16: bool, device: torch.device, random: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = LAYERS[name]().to(device)
    for each in layer.parameters():
        each.data = random(*each.shape) * each.shape[-1] ** -0.5 + (each.ndim == 1)
    x, grad = random(2, 9, 32), random(2, 9, 32)
    rotary = tables(9, 8 if name == "mla" else 16, x)
    counted: list[int] = []
    split = heads._split_heads
    monkeypatch.setattr(heads, "_split_heads", lambda *a: counted.append(1) or split(*a))

    def ran(by_kernel: bool, wide: bool = False) -> list[Tensor]:
        monkeypatch.setattr(attention, "_in_one_visit", lambda *_: by_kernel)
        monkeypatch.setattr(attention, "causal_attention", by_torch)
        made = layer.double() if wide else layer.float()
        inputs = x.to(torch.float64 if wide else torch.float32).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16 and not wide), remaking(True):
            out = made(inputs, rotary)
        results = torch.autograd.grad(out, (inputs, *made.parameters()), grad.to(out.dtype))
        return [out.detach(), *results]

    exact, today = ran(by_kernel=False, wide=True), ran(by_kernel=False)
    assert not counted
    found = ran(by_kernel=True)
    assert len(counted) == (2 if name == "mla" else 1)  # keys of latent attention are made again
    for each, before, right in zip(found, today, exact):
        assert (each.dtype, each.shape) == (before.dtype, before.shape)
        assert error(each, right) <= allowed(before, right, count=4)


def by_torch(q: Tensor, k: Tensor, v: Tensor, scale: float, *, grouped: bool = False) -> Tensor:
    """`causal_attention` as a GPU has it, also where a CPU has BF16."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_attention_makes_of_them_is_side_by_side_already(dtype: torch.dtype, random: Random) -> None:
    inputs = [random(2, 70, c, dtype=dtype).requires_grad_() for c in (3 * 64, 3 * 96, 32)]
    made = heads.LatentHeads.apply(*inputs, *tables(70, 32, inputs[0]), 3)
    out = by_torch(*made, 0.125)
    assert attention._by_token(out).data_ptr() == out.data_ptr()


def test_they_are_taken_where_triton_and_the_formats_are(random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(2, 3, 4)
    turn = tables(3, 4, x)
    monkeypatch.setattr(attention, "runs_triton", lambda device: device == x.device)
    assert attention._in_one_visit(turn, x, x.half())
    assert not attention._in_one_visit(turn, x, x.double())
    assert not attention._in_one_visit((turn[0].half(), turn[1]), x)
    monkeypatch.setattr(attention, "runs_triton", lambda device: False)
    assert not attention._in_one_visit(turn, x)


def test_shapes_that_do_not_fit_are_said(random: Random) -> None:
    q, kv, rotary, turn = random(2, 5, 3 * 16), random(2, 5, 3 * 24), random(2, 5, 8), tables(5, 8, random(1))
    for wrong, message in (
        ((q, kv, rotary, *tables(4, 8, q), 3), "of 5 tokens"),
        ((q, kv, rotary, turn[0].half(), turn[1].half(), 3), "FP32"),
        ((q[..., 1:], kv, rotary, *turn, 3), "q: 3 heads"),
        ((q, kv[..., 1:], rotary, *turn, 3), "kv: of 3 heads"),
        ((q, kv[..., : 3 * 8], rotary, *turn, 3), "kv: 8 features of a head"),
        ((q, kv, rotary[..., 1:], *turn, 3), "rotary keys: 8 features"),
        ((q, kv.half(), rotary, *turn, 3), "one format"),
    ):
        with pytest.raises(ValueError, match=message):
            heads.LatentHeads.apply(*wrong)
    with pytest.raises(ValueError, match="as many tokens and features"):
        heads.GroupedHeads.apply(q.unflatten(2, (6, 8)), q.unflatten(2, (3, 16)), *turn, torch.float32)
