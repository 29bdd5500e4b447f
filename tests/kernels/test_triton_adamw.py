"""AdamW by its kernel: against float64 and torch's own, clipping included, and in a run's step.

Every step rounds a parameter twice and a moment three times, half a unit in FP32's last place each, and what it moves
a parameter by, at most three times the rate, a dozen times.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from accelerate.state import AcceleratorState
from operations import Operations
from small_model import SMALL
from torch import Tensor, nn

pytest.importorskip("triton")

from kernel_checks import error

from moe_train.benchmark.arms import TrainingArm
from moe_train.benchmark.host_reads import HostReads
from moe_train.compose import compose_run
from moe_train.kernels import adamw as kernel
from moe_train.training import clipping, muon
from moe_train.training.adamw import BF16AdamW, KernelAdamW
from moe_train.training.moments import Rounding
from moe_train.training.runtime import start_runtime

# Single numbers, none at all, less than a block, several blocks and their ends, several programs.
SHAPES = ((), (5,), (0, 4), (8, 16), (3, 41, 17), (2048,), (8193,), (20000,))
EPS, BF16 = 1e-8, torch.bfloat16
STEPS = 5
RATE = 0.01
UNIT = 2.0**-24  # half of one, of 1


def limits(steps: int) -> dict[str, float]:
    """Of the difference that rounding makes between two who take as many steps."""
    return {"rtol": 4 * steps * UNIT, "atol": 24 * 3 * RATE * steps * UNIT}


Draw = Callable[..., Tensor]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Whether optimizers that are built use the kernels, on a CPU too."""
    return lambda on: monkeypatch.setattr(clipping, "runs_triton", lambda device: on)


def reference(
    values: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],
    betas: tuple[float, float],
    rate: float,
    decay: float,
) -> list[list[Tensor]]:
    """Parameters, first and second moments in float64 (arXiv 1711.05101, algorithm 2)."""
    found: list[list[Tensor]] = [[], [], []]
    for value, *own in zip(values, *gradients, strict=True):
        parameter, first, second = value.double(), torch.zeros_like(value).double(), torch.zeros_like(value).double()
        for t, gradient in enumerate(own, 1):
            g = gradient.double()
            first = betas[0] * first + (1 - betas[0]) * g
            second = betas[1] * second + (1 - betas[1]) * g * g
            root = (second / (1 - betas[1] ** t)).sqrt() + EPS
            parameter = parameter - rate * decay * parameter - rate * first / (1 - betas[0] ** t) / root
        for into, tensor in zip(found, (parameter, first, second), strict=True):
            into.append(tensor)
    return found


def grouped(values: Sequence[Tensor]) -> list[dict[str, object]]:
    """Parameters of these values in two groups, of which one decays."""
    parameters = [nn.Parameter(value.clone()) for value in values]
    return [{"params": parameters[::2], "weight_decay": 0.1}, {"params": parameters[1::2], "weight_decay": 0.0}]


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def trained(
    optimizer: torch.optim.Optimizer, gradients: Sequence[Sequence[Tensor | None]], *rest: Tensor
) -> list[Tensor]:
    """Its parameters after these steps; rest: the coefficient, for one that takes it."""
    for of_step in gradients:
        for parameter, gradient in zip(parameters_of(optimizer), of_step, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        clipping.step(optimizer, *(rest or (None,)))
    return [parameter.detach() for parameter in parameters_of(optimizer)]


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.0)], ids=str)
def test_steps_are_those_of_float64(betas: tuple[float, float], random: Draw) -> None:
    values = [random(*shape) for shape in SHAPES]
    gradients = [[3 * random(*shape) for shape in SHAPES] for _ in range(STEPS)]
    exact = reference(values, gradients, betas, RATE, 0.1)
    chosen = {"lr": RATE, "betas": betas, "eps": EPS, "weight_decay": 0.1}
    for kind in (KernelAdamW, torch.optim.AdamW):
        optimizer = kind([nn.Parameter(value.clone()) for value in values], fused=True, **chosen)
        found = trained(optimizer, gradients)
        states = [optimizer.state[parameter] for parameter in parameters_of(optimizer)]
        assert all(state["step"] == STEPS for state in states)
        if kind is torch.optim.AdamW:
            theirs = found
            continue
        mine = found
        for name, expected in (("exp_avg", exact[1]), ("exp_avg_sq", exact[2])):
            for state, moment in zip(states, expected, strict=True):
                assert error(state[name], moment) <= 3 * UNIT
    for own, other, expected in zip(mine, theirs, exact[0], strict=True):
        largest = expected.abs().amax() if len(expected.flatten()) else 0
        assert ((own.double() - expected).abs() <= STEPS * UNIT * (2 * largest + 12 * 3 * RATE)).all()
        assert error(own, expected) <= 1.5 * error(other, expected) + UNIT


@pytest.mark.parametrize("coefficient", [None, 1.0, 0.3])
def test_every_step_is_torchs_in_all_groups_and_without_some_gradients(coefficient: float | None, random: Draw) -> None:
    values = [random(*shape) for shape in SHAPES]
    chosen = {"lr": RATE, "betas": (0.9, 0.95), "eps": EPS, "fused": True}
    mine, theirs = KernelAdamW(grouped(values), **chosen), torch.optim.AdamW(grouped(values), **chosen)
    rest = () if coefficient is None else (torch.tensor(coefficient, device=values[0].device),)
    for step in range(STEPS):
        gradients = [random(*p.shape) if step % 2 or n % 3 else None for n, p in enumerate(parameters_of(mine))]
        clipped = [None if g is None else g * (coefficient or 1.0) for g in gradients]
        for own, other in zip(trained(mine, [gradients], *rest), trained(theirs, [clipped]), strict=True):
            torch.testing.assert_close(own, other, **limits(step + 1))
        for own, other in zip(parameters_of(mine), parameters_of(theirs), strict=True):
            assert mine.state[own].keys() == theirs.state[other].keys()
            for name, tensor in mine.state[own].items():
                torch.testing.assert_close(tensor, theirs.state[other][name], rtol=16 * UNIT, atol=16 * UNIT)


def test_a_coefficient_multiplies_gradients_and_one_changes_no_bit(random: Draw) -> None:
    values, gradients = [random(*shape) for shape in SHAPES], [[random(*shape) for shape in SHAPES] for _ in range(3)]
    for moments in (torch.float32, BF16):
        found = []
        for factor, given in ((None, 1.0), (1.0, 1.0), (0.7, 1.0), (None, 0.7)):
            of_kernel = {name: [torch.zeros_like(value, dtype=moments) for value in values] for name in "mv"}
            own, counts = [value.clone() for value in values], [torch.zeros((), device=v.device) for v in values]
            for of_step in gradients:
                kernel.step(
                    own,
                    [gradient * given for gradient in of_step],
                    *(of_kernel["m"], of_kernel["v"], counts),
                    rate=torch.tensor(RATE, device=values[0].device),
                    betas=(0.9, 0.95),
                    eps=EPS,
                    decay=0.1,
                    coefficient=None if factor is None else torch.tensor(factor, device=values[0].device),
                )
            found.append([*own, *of_kernel["m"], *of_kernel["v"]])
        same = [all(torch.equal(*pair) for pair in zip(found[one], found[other])) for one, other in ((0, 1), (2, 3))]
        assert same == [True, True]
        assert not torch.equal(found[0][-1], found[2][-1])


def test_moments_in_bf16_are_rounded_to_the_nearest(taken: Callable[[bool], None], random: Draw) -> None:
    """From one state, which every step gives both: rounded once, a moment's last bit moves what comes after it."""
    values = [random(*shape) for shape in SHAPES]
    chosen = {"lr": RATE, "betas": (0.9, 0.95), "eps": EPS}
    found = []
    for on in (True, False):
        taken(on)
        found.append(BF16AdamW(grouped(values), **chosen))
        assert found[-1].takes_coefficient == on
    for _ in range(STEPS):
        gradients = [random(*parameter.shape) for parameter in parameters_of(found[0])]
        found[1].load_state_dict(copy.deepcopy(found[0].state_dict()))
        for own, other in zip(parameters_of(found[0]), parameters_of(found[1]), strict=True):
            other.data.copy_(own)
        for own, other in zip(*(trained(optimizer, [gradients]) for optimizer in found), strict=True):
            torch.testing.assert_close(own, other, **limits(1))
        for own, other in zip(*map(parameters_of, found), strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                one, two = found[0].state[own][name], found[1].state[other][name]
                assert one.dtype == two.dtype == BF16
                torch.testing.assert_close(one, two, rtol=2**-7, atol=16 * UNIT)  # FP32's last bit decides ties
                assert (one != two).sum() <= 1 + one.numel() // 1000
    taken(True)
    assert not BF16AdamW(grouped(values), rounding=Rounding(stochastic=True), **chosen).takes_coefficient


@pytest.mark.parametrize("moments", [torch.float32, BF16])
def test_states_are_loaded_in_both_directions(
    moments: torch.dtype, taken: Callable[[bool], None], random: Draw
) -> None:
    values = [random(*shape) for shape in SHAPES]
    gradients = [[random(*shape) for shape in SHAPES] for _ in range(2 * STEPS)]
    chosen = {"lr": RATE, "betas": (0.9, 0.95), "eps": EPS}

    def built(by_kernel: bool, values: Sequence[Tensor]) -> torch.optim.Optimizer:
        taken(by_kernel)
        if moments == BF16:
            return BF16AdamW(grouped(values), **chosen)
        return (KernelAdamW if by_kernel else torch.optim.AdamW)(grouped(values), fused=True, **chosen)

    final = []
    for first, second in ((True, True), (True, False), (False, True), (False, False)):
        before = built(first, values)
        gradients_of = [[step[SHAPES.index(tuple(p.shape))] for p in parameters_of(before)] for step in gradients]
        halfway = trained(before, gradients_of[:STEPS])
        saved = copy.deepcopy(before.state_dict())
        in_order = sorted(range(len(SHAPES)), key=lambda n: (n % 2, n))  # of the two groups
        after = built(second, [halfway[in_order.index(n)] for n in range(len(SHAPES))])
        after.load_state_dict(saved)
        final.append(trained(after, gradients_of[STEPS:]))
        groups = [{k: v for k, v in group.items() if k != "params"} for group in after.param_groups]
        assert groups == [{k: v for k, v in group.items() if k != "params"} for group in before.param_groups]
        assert {str(t.dtype) for s in after.state.values() for t in s.values() if t.ndim} == {str(moments)}
    for others in final[1:]:
        for own, other in zip(final[0], others, strict=True):
            allowed = limits(2 * STEPS)
            if moments == BF16:  # that was rounded otherwise moves an update by 1/256
                allowed["atol"] += 3 * RATE / 256
            torch.testing.assert_close(own, other, **allowed)


def test_many_tensors_that_begin_anywhere_and_gradients_that_lie_otherwise(random: Draw) -> None:
    memory, gradients = random(1, 90 * 31)[0], [random(5, 6).t() for _ in range(90)]
    values = [memory[31 * n + 1 : 31 * n + 31].view(6, 5) for n in range(90)]
    exact = reference(values, [gradients], (0.9, 0.95), RATE, 0.1)
    before = memory.clone()
    chosen = {"lr": RATE, "betas": (0.9, 0.95), "eps": EPS, "weight_decay": 0.1}
    optimizer = KernelAdamW([nn.Parameter(value) for value in values], fused=True, **chosen)
    for parameter, gradient in zip(parameters_of(optimizer), gradients, strict=True):
        parameter.grad = gradient
        assert not gradient.is_contiguous()
    optimizer.step()
    for value, expected in zip(values, exact[0], strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(memory[::31], before[::31])  # between them


@pytest.mark.parametrize("moments", [torch.float32, BF16])
def test_nothing_is_read_by_the_host_or_copied_from_it(
    moments: torch.dtype, taken: Callable[[bool], None], random: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the interpreter's own doings, which are left out."""
    taken(True)
    values = [random(*shape) for shape in SHAPES]
    chosen = {"lr": torch.tensor(RATE, device=values[0].device), "betas": (0.9, 0.95), "eps": EPS}
    kind = BF16AdamW if moments == BF16 else KernelAdamW
    optimizer = kind(grouped(values), **chosen)
    gradients = [random(*parameter.shape) for parameter in parameters_of(optimizer)]
    trained(optimizer, [gradients])
    for launched in ("_corrections_kernel", "_adamw_kernel"):
        monkeypatch.setattr(kernel, launched, collections.defaultdict(lambda: lambda *_, **__: None))
    names: set[str] = set()
    with HostReads() as reads, Operations(lambda operation, _, __: names.add(operation._schema.name)):
        optimizer.step(coefficient=chosen["lr"])
    assert not reads.places
    assert not names & {"aten::copy_", "aten::_to_copy", "aten::lift_fresh", "aten::_local_scalar_dense"}
    assert "aten::_foreach_add_" in names


@pytest.mark.gpu
def test_replays_of_a_cuda_graph_read_gradients_rate_and_coefficient_anew() -> None:
    """And find them, although a step between them had its gradients elsewhere."""
    cuda, generator = torch.device("cuda"), torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(cuda) for shape in SHAPES]
    rate, coefficient = torch.zeros((), device=cuda), torch.zeros((), device=cuda)
    launched, replayed = (KernelAdamW(grouped(values), lr=rate, betas=(0.9, 0.95), eps=EPS) for _ in range(2))
    gradients = [torch.zeros_like(parameter) for parameter in parameters_of(launched)]

    def draw(step: int) -> None:
        rate.fill_(RATE / (step + 1))
        coefficient.fill_(0.2 * (step + 1))
        for gradient in gradients:
            gradient.copy_(torch.randn(gradient.shape, generator=generator))

    def take(optimizer: KernelAdamW, *, elsewhere: bool) -> None:
        for parameter, gradient in zip(parameters_of(optimizer), gradients, strict=True):
            parameter.grad = gradient.clone() if elsewhere else gradient
        optimizer.step(coefficient=coefficient)

    draw(0)
    take(launched, elsewhere=True)
    take(replayed, elsewhere=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        take(replayed, elsewhere=False)
    for step in range(1, 5):
        draw(step)
        take(launched, elsewhere=True)
        if step == 2:
            take(replayed, elsewhere=True)
        else:
            graph.replay()
    for one, other in zip(parameters_of(launched), parameters_of(replayed), strict=True):
        assert torch.equal(one, other)
        assert launched.state[one]["step"] == replayed.state[other]["step"] == 5


def test_operands_that_do_not_fit_are_said(random: Draw) -> None:
    x, one = random(4, 6), random(1)[0]
    rest = {"rate": one, "betas": (0.9, 0.95), "eps": EPS, "decay": 0.0}
    for operands, message in (
        (([x], [x.t()], [x], [x], [one]), "contiguous, of one size"),
        (([x], [x[:2]], [x], [x], [one]), "contiguous, of one size"),
        (([x], [x], [x], [x, x], [one]), "one of each for a parameter"),
        (([x], [x.bfloat16()], [x], [x], [one]), "gradients: FP32"),
        (([x], [x], [x], [x.bfloat16()], [one]), "moments: of one format"),
        (([x], [x], [x.half()], [x.half()], [one]), "moments: FP32 or BF16"),
        (([x], [x], [x], [x], [x]), "counts: FP32, one each"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel.step(*operands, **rest)


@pytest.mark.parametrize("settings", [("adamw",), ("muon",), ("adamw", "optimizer.moments=bfloat16")], ids=str)
def test_a_runs_steps_are_the_same_with_and_without(
    settings: tuple[str, ...], taken: Callable[[bool], None], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradients of which clipping takes two thirds and more."""
    monkeypatch.setattr(muon, "fast_dtype", lambda _: torch.float32)
    name, *others = settings
    small = ["model=nano", *SMALL, "data.sequence_length=16", "batch_size=4", "micro_batch_size=2", "precision=fp32"]
    chosen = [*small, f"optimizer={name}", *others, "optimizer.max_grad_norm=0.3", "cuda_graphs=never"]
    config = compose_run(chosen, "test", None)
    found = []
    for on in (True, False):
        taken(on)
        AcceleratorState._reset_state(True)
        arm = TrainingArm(config, start_runtime(config))
        start = [parameter.detach().clone() for parameter in arm.model.parameters()]
        assert arm._stepper._multiplies is not on
        figures = []
        for step in range(3):
            arm._stepper.step(step, *arm.batches[step], 1.0, 0.0)
            figures.append(arm._stepper.read_totals())
        moved = [p.detach() - begin for p, begin in zip(arm.model.parameters(), start, strict=True)]
        found.append(([(each.loss, each.grad_norm) for each in figures], moved))
    AcceleratorState._reset_state(True)  # the next test may want another precision
    (mine, moved), (theirs, expected) = found
    assert min(norm for _, norm in mine) > 0.9
    assert mine[0] == theirs[0]
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-3, atol=0)
    for own, other in zip(moved, expected, strict=True):
        assert error(own, other.double()) < 1e-3
