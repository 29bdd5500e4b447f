"""RMSNorm of a sum in Triton: against float64 and against torch's operations, made again backward, and in a model."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from kernel_checks import allowed, error, floor

from moe_train.kernels import norm as kernel
from moe_train.model import gpu_norm
from moe_train.model.norm import RMSNorm, normed
from moe_train.model.transformer import Transformer
from moe_train.precision.remade import remaking

EPS = 1e-6
WIDE, BF16, HALF = torch.float32, torch.bfloat16, torch.float16

Draw = Callable[..., Tensor]
Formats = tuple[torch.dtype, torch.dtype | None, torch.dtype | None, bool]  # of x, what is added and the norm; exact?


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Whether the kernels are used, on a CPU too."""

    def choose(on: bool) -> None:
        monkeypatch.setattr(gpu_norm, "runs_triton", lambda device: on)

    return choose


def norm_of(weight: Tensor) -> RMSNorm:
    norm = RMSNorm(len(weight), EPS)
    norm.weight = torch.nn.Parameter(weight)
    return norm


def ramp(like: Tensor) -> Tensor:
    """A gradient, of a few lengths."""
    return torch.linspace(-1, 2, like.numel(), dtype=torch.float64).view(like.shape).to(like.device, like.dtype)


def outputs_and_gradients(
    x: Tensor,
    added: Tensor | None,
    weight: Tensor,
    narrow: torch.dtype | None,
    exact: bool,
    function: Callable[..., tuple],
) -> list[Tensor]:
    """Sum and norms, and the gradients of all that went in."""
    leaves = [None if each is None else each.detach().requires_grad_() for each in (x, added, weight)]
    out = [each for each in function(*leaves, EPS, narrow, exact)[:3] if each is not None]
    asked = [each for each in leaves if each is not None]
    return [*out, *torch.autograd.grad(out, asked, [ramp(each) for each in out])]


def by_torch(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, narrow: torch.dtype | None, exact: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """In FP32, or in float64 if that is what it is given."""
    total = x if added is None else x + added
    wide = total.to(weight.dtype)
    wide = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    rounded = narrow and wide.to(narrow if weight.dtype == WIDE else weight.dtype)
    return total, rounded, wide if exact else None


def sizes(device: torch.device) -> list[tuple[int, int]]:
    """Rows and their width: a block and less, several programs, widths that are no power of two, none at all."""
    few = [(5, 8), (3, 1), (70, 96), (1, 300), (300, 130), (0, 64)]
    return few if device.type == "cpu" else [*few, (8192, 1024), (20001, 384), (4097, 100), (301, 7000), (64, 8192)]


@pytest.mark.parametrize(
    "formats",
    [
        (WIDE, BF16, BF16, True),
        (WIDE, BF16, BF16, False),
        (WIDE, None, BF16, True),
        (WIDE, HALF, HALF, True),
        (WIDE, WIDE, None, True),
        (WIDE, WIDE, BF16, False),
        (WIDE, None, None, True),
        (BF16, None, BF16, False),
        (HALF, None, HALF, True),
    ],
)
def test_sum_norms_and_gradients_are_those_of_float64_as_nearly_as_torchs(
    formats: Formats, device: torch.device, random: Draw
) -> None:
    """An input's gradient is the difference of two terms that may nearly cancel: torch's own error is the measure."""
    own, other, narrow, exact = formats
    for rows, d in sizes(device):
        x, weight = 3 * random(rows, d, dtype=own), random(d).abs() + 0.5
        added = None if other is None else random(rows, d, dtype=other)
        found = outputs_and_gradients(x, added, weight, narrow, exact, gpu_norm.NormOfSum.apply)
        torchs = outputs_and_gradients(x, added, weight, narrow, exact, by_torch)
        doubles = [None if each is None else each.double() for each in (x, added, weight)]
        true = outputs_and_gradients(*doubles, narrow, exact, by_torch)
        for mine, theirs, real in zip(found, torchs, true, strict=True):
            assert mine.dtype == theirs.dtype
            assert mine.shape == theirs.shape
            if mine.numel():
                # Gradients go in rounded, those of float64 do not: what torch's have of that is in its error.
                assert error(mine, real) <= allowed(theirs, real)


def test_the_gradient_of_the_stream_is_added_in_the_same_visit_and_each_may_lack(random: Draw) -> None:
    rows, d = 37, 80
    x, added, weight = random(rows, d), random(rows, d, dtype=BF16), random(d) + 2
    total, _, _, scale = gpu_norm.rms_norm(x, added, weight, EPS, BF16, True)
    along, narrow, exact = random(rows, d), random(rows, d, dtype=BF16), random(rows, d)
    for grads in ((along, narrow, exact), (None, narrow, exact), (along, None, exact), (along, narrow, None)):
        leaves = [total.double().requires_grad_(), weight.double().requires_grad_()]
        out = by_torch(leaves[0], None, leaves[1], EPS, BF16, True)
        pairs = [(each, grad.double()) for each, grad in zip(out, grads) if grad is not None]
        expected = torch.autograd.grad([each for each, _ in pairs], leaves, [grad for _, grad in pairs])
        grad_x, grad_added, grad_weight = gpu_norm.rms_norm_backward(total, weight, scale, *grads, BF16)
        assert error(grad_x, expected[0]) < 3e-6
        assert torch.equal(grad_added, grad_x.bfloat16())
        assert error(grad_weight, expected[1]) < 3e-6


def test_rows_that_are_a_part_of_longer_ones_are_read_where_they_lie(random: Draw) -> None:
    longer, weight = random(6, 50, 80, dtype=BF16), random(64) + 2
    part = longer[..., :64]
    assert kernel._as_rows(part, 64).data_ptr() == part.data_ptr()
    found, alone = (
        outputs_and_gradients(each, None, weight, BF16, True, gpu_norm.NormOfSum.apply)
        for each in (part, part.contiguous())
    )
    assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))


def test_places_that_32_bits_do_not_count_are_reached(device: torch.device, random: Draw) -> None:
    d, times = 8192, 2 if device.type == "cpu" else 52430
    x, added, weight = random(5, d), random(5, d, dtype=BF16), random(d) + 2
    results = []
    for count in (1, times):
        total, narrow, _, scale = gpu_norm.rms_norm(
            x.repeat(count, 1), added.repeat(count, 1), weight, EPS, BF16, False
        )
        grad_x, grad_added, _ = gpu_norm.rms_norm_backward(total, weight, scale, None, narrow, None, BF16)
        results.append([each[-5:] for each in (total, narrow, scale, grad_x, grad_added)])
        del total, narrow, grad_x, grad_added
    assert device.type == "cpu" or 5 * times * d > 2**31
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_heads_that_are_apart_and_a_gradient_that_is_one_number_are_read_right(random: Draw) -> None:
    x, weight = random(2, 5, 3, 32), random(32) + 2
    turned = x.transpose(1, 2)
    found, alone = (
        outputs_and_gradients(each, None, weight, None, True, gpu_norm.NormOfSum.apply)
        for each in (turned, turned.contiguous())
    )
    assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))
    leaf = x.requires_grad_()
    gpu_norm.NormOfSum.apply(leaf, None, weight, EPS, None, True)[2].sum().backward()
    expected = torch.autograd.grad(by_torch(leaf, None, weight, EPS, None, True)[2].sum(), leaf)[0]
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-5)


def test_the_same_bits_every_time_and_made_again(random: Draw) -> None:
    """From the sum, with other operands than the first time, and so perhaps another layout."""
    x, added, weight = random(500, 192), random(500, 192, dtype=BF16), random(192) + 2
    total, narrow, exact, scale = gpu_norm.rms_norm(x, added, weight, EPS, BF16, True)
    for wanted in ((BF16, True), (BF16, False), (None, True)):
        again = gpu_norm.again(total, scale, weight, *wanted)
        assert all(mine is None or torch.equal(mine, first) for mine, first in zip(again, (narrow, exact)))
    once, twice = (outputs_and_gradients(x, added, weight, BF16, True, gpu_norm.NormOfSum.apply) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(once, twice, strict=True))


@pytest.mark.parametrize("precision", [BF16, HALF, WIDE])
def test_only_the_sum_is_kept_and_both_norms_are_made_again_with_the_same_bits(
    precision: torch.dtype, taken: Callable[[bool], None], device: torch.device, random: Draw
) -> None:
    taken(True)
    x, added, norm = random(100, 64).requires_grad_(), random(100, 64, dtype=precision), norm_of(random(64) + 2)
    read: list[Tensor] = []

    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(*tensors)
            return sum(each.float().sum() for each in tensors)

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            read.extend(ctx.saved_tensors)
            return tuple(torch.ones_like(each) for each in ctx.saved_tensors)

    with torch.autocast(device.type, precision, enabled=precision != WIDE), remaking(True):
        made = normed(norm, x, added, exact=True)
        total, narrow, exact = made.total, made.narrow, made.exact
        del made
        assert (total.dtype, narrow.dtype, exact.dtype) == (WIDE, precision, WIDE)
        before = [narrow.clone(), exact.clone()]
        where = [torch.multiprocessing.reductions.StorageWeakRef(each.untyped_storage()) for each in (narrow, exact)]
        out = Reads.apply(narrow, exact) + total.sum()
    del narrow, exact
    gc.collect()  # the interpreter leaves a cycle
    assert all(each.expired() for each in where)
    out.backward()
    assert all(torch.equal(*pair) for pair in zip(before, read, strict=True))
    assert x.grad is not None


def test_within_a_checkpoint_gradients_are_the_same(taken: Callable[[bool], None], random: Draw) -> None:
    taken(True)
    norm = norm_of(random(48) + 2)
    x, added = random(20, 48), random(20, 48, dtype=BF16)

    def run(*inputs: Tensor) -> Tensor:
        with torch.autocast(x.device.type, BF16):
            made = normed(norm, *inputs, exact=True)
        return made.total.sin().sum() + made.narrow.float().square().sum() + made.exact.cos().sum()

    found = []
    for kept in (True, False):
        leaves = [x.clone().requires_grad_(), added.clone().requires_grad_()]
        out = run(*leaves) if kept else checkpoint(run, *leaves, use_reentrant=False)
        found.append(torch.autograd.grad(out, [*leaves, norm.weight]))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [BF16, WIDE])
def test_gradients_of_the_stream_alone_go_past_the_norm(
    dtype: torch.dtype, taken: Callable[[bool], None], random: Draw
) -> None:
    taken(True)
    leaves = [random(9, 64).requires_grad_(), random(9, 64, dtype=dtype).requires_grad_()]
    total = normed(norm_of(random(64)), *leaves).total
    grads = torch.autograd.grad(total, leaves, torch.full_like(total, 0.3))
    for grad, leaf in zip(grads, leaves, strict=True):
        assert torch.equal(grad, torch.full_like(leaf, 0.3))


def test_nan_stays_in_its_row_and_a_row_of_zeros_has_a_finite_gradient(random: Draw) -> None:
    x, weight = random(33, 64), random(64) + 2
    x[7, 3] = torch.nan
    x[8] = 0
    total, narrow, exact, grad_x, _ = outputs_and_gradients(x, None, weight, BF16, True, gpu_norm.NormOfSum.apply)
    for each in (narrow, exact, grad_x):
        assert each[7].isnan().all()
        assert each.isnan().sum() == 64
    assert total.isnan().sum() == 1


def test_operators_say_what_they_return(random: Draw) -> None:
    """Shapes, strides and formats without the numbers, as torch.compile asks."""
    checks = ("test_schema", "test_faketensor")
    x, added, weight = random(4, 6, 48), random(4, 6, 48, dtype=BF16), random(48)
    for arguments in ((x, added, weight, EPS, BF16, True), (added, None, weight, EPS, None, False)):
        torch.library.opcheck(gpu_norm.rms_norm, arguments, test_utils=checks)
    total, *_, scale = gpu_norm.rms_norm(x, added, weight, EPS, BF16, True)
    for arguments in ((total, weight, scale, x, added, None, BF16), (total, weight, scale, None, None, x, None)):
        torch.library.opcheck(gpu_norm.rms_norm_backward, arguments, test_utils=checks)


def test_what_it_does_not_take_is_left_to_torch(taken: Callable[[bool], None], random: Draw) -> None:
    x, added, weight = random(10, 64), random(10, 64, dtype=BF16), random(64)
    assert gpu_norm.takes(x, weight, added) == x.is_cuda
    taken(True)
    assert gpu_norm.takes(x, weight, added)
    assert gpu_norm.takes(added, weight)
    assert not gpu_norm.takes(added, weight, added)
    assert not gpu_norm.takes(x.double(), weight)
    assert not gpu_norm.takes(x, weight.bfloat16())
    assert not gpu_norm.takes(x, weight, added[:1])
    assert not gpu_norm.takes(random(2, 8193), random(8193))
    with pytest.raises(ValueError, match="rows of 8193 numbers, not 1 to 8192"):
        kernel.norm_rows(random(2, 8193), None, random(8193), x, eps=EPS, total=None, narrow=None, exact=None)
    with pytest.raises(ValueError, match="rows of 64 numbers, as the weight has"):
        kernel.norm_rows(random(2, 63), None, weight, x, eps=EPS, total=None, narrow=None, exact=None)


@pytest.mark.parametrize(
    "attention", [(), ("attention=gqa_4x32", "attention.head_dim=8", "attention.qk_norm=per_head")]
)
def test_a_model_is_the_same_with_and_without(
    attention: tuple[str, ...],
    taken: Callable[[bool], None],
    device: torch.device,
    small_model: Callable[..., Transformer],
) -> None:
    """With all experts, so that no rounding can choose others."""
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for on, dtype in ((True, WIDE), (False, WIDE), (False, torch.float64)):
        taken(on)
        place = device if dtype == WIDE else torch.device("cpu")  # experts in FP64 are not for GPUs
        model = small_model("mtp=depth_2", "moe.top_k=8", *attention, dtype=dtype).to(place)
        with torch.autocast(place.type, BF16, enabled=dtype == WIDE):
            losses = model(tokens[:, :-1].to(place), tokens[:, 1:].to(place), 0.3)
        losses.objective.backward()
        gradients = {name: each.grad.cpu() for name, each in model.named_parameters() if each.grad is not None}
        found.append((losses.objective.cpu(), gradients))
    (mine, mine_by_name), (_, theirs_by_name), (true, true_by_name) = found
    assert error(mine, true) < 1e-2
    assert mine_by_name.keys() == true_by_name.keys()
    for name, exact in true_by_name.items():
        limit = 1.5 * error(theirs_by_name[name], exact) + floor(exact)
        assert error(mine_by_name[name], exact) <= limit, name
