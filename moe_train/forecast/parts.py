"""A step of training on many devices put together from its parts, and what becomes of the GPU-hours.

Devices are placed so: those that share out experts (`expert_parallel`) are neighbours and fill nodes, the copies of a
stage follow, the stages of the pipeline lie farthest apart. A device works on sequences of its own. The slowest stage
sets the pace: layers go whole to stages. DualPipe hides the all-to-all behind the other direction's products, for which
it lends some multiprocessors, but not in the chunks at its ends, which overlap with nothing. In other schedules, and
without a pipeline, only shared experts work meanwhile, forward and for gradients of inputs (arXiv 2405.04434, section
3.1.3). Gathers of `sharding=fsdp2` are hidden behind products as far as these last, what happens once a step is not.

Left out: uneven load of experts, devices slowed by their power limit, evaluation, checkpoints, failures, restarts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_train.config import HardwareConfig, ModelConfig
from moe_train.cost.flops import (
    ROUTED_EXPERTS,
    ROUTER,
    SHARED_EXPERTS,
    main_forward_flops,
    main_parameters,
    mtp_forward_flops,
    mtp_parameters,
)
from moe_train.errors import UserError
from moe_train.forecast.communication import Exchange, Network, devices_visited, dispatch_bytes
from moe_train.forecast.passes import Passes
from moe_train.forecast.pipeline import Chunk, Schedule, alone_chunks, bubble_seconds, check_schedule, stages_held
from moe_train.forecast.rates import LENT_MULTIPROCESSORS, WIDE_QUERIES_KERNEL, AttentionKernel
from moe_train.forecast.work import GRADIENT_SUM_BYTES, MEMORY, Speeds, all_layers, wide_queries, work

Sharding = Literal["ddp", "zero1", "fsdp2"]
UNEVEN, LENT, BUBBLES = "uneven stages", "multiprocessors lent to communication", "pipeline bubbles"
DISPATCH, COMBINE, TRANSFERS = "expert dispatch", "expert combine", "between stages"
OPTIMIZER, SHARDS, REPLICAS = "optimizer", "gather and reduce-scatter", "all-reduce of replicas"
WEIGHT, GRADIENT = 2, 4  # bytes of a parameter: BF16 weights, FP32 gradients
STATES = 4 + 2 * 2  # FP32 master weights and two moments in BF16 (arXiv 2412.19437, section 3.3.3)


@dataclass(frozen=True)
class Machine:
    """Devices, and how the run is laid over them. Sizes that do not divide raise UserError (`micro_batches`)."""

    hardware: HardwareConfig
    num_devices: int
    pipeline_parallel: int
    expert_parallel: int
    schedule: Schedule
    sharding: Sharding

    @property
    def copies(self) -> int:
        """Devices that work on one stage, each on data of its own."""
        return self.num_devices // self.pipeline_parallel

    @property
    def network(self) -> Network:
        if self.hardware.links is None:
            raise UserError(
                f"hardware={self.hardware.name} has no link bandwidths: give links: in its file, or choose one that has"
            )
        return Network.of(self.hardware.links)


@dataclass(frozen=True)
class Task:
    """What is trained: sequences a step (`batch_size`), sequences a device takes at once (`micro_batch`)."""

    model: ModelConfig
    vocab_size: int
    sequence_length: int
    batch_size: int
    micro_batch: int
    fp8: bool
    attention_kernel: AttentionKernel | None = None  # None: as `kernel` says

    @property
    def kernel(self) -> AttentionKernel:
        return self.attention_kernel or (WIDE_QUERIES_KERNEL if wide_queries(self.model) else "flash_attention_3")


@dataclass(frozen=True)
class Step:
    """Seconds of one device in one step; `exposed` add up to its length, `hidden` pass meanwhile."""

    exposed: dict[str, float]
    hidden: dict[str, float]
    micro_batches: int
    state_bytes: float
    tokens: int

    @property
    def seconds(self) -> float:
        return sum(self.exposed.values())


def micro_batches(task: Task, machine: Machine) -> int:
    """Of one device in a step. Raises UserError for what does not divide, with what would."""
    n, stages, experts = machine.num_devices, machine.pipeline_parallel, machine.expert_parallel
    if n % stages:
        raise UserError(f"pipeline_parallel={stages} does not divide num_gpus={n}: choose a divisor of it")
    layers = sum(count for _, count in all_layers(task.model))
    if stages > layers:
        raise UserError(f"pipeline_parallel={stages} is more than the {layers} layers there are: lower it")
    moe = task.model.moe
    if experts > 1 and moe is None:
        raise UserError(f"expert_parallel={experts} shares out experts and {task.model.name} has none: leave it out")
    if machine.copies % experts or (moe is not None and moe.num_experts % experts):
        of = "" if moe is None else f" and the {moe.num_experts} experts"
        raise UserError(
            f"expert_parallel={experts} does not divide the {machine.copies} devices of a stage{of}: choose a divisor"
        )
    at_once = machine.copies * task.micro_batch
    if task.batch_size % at_once:
        raise UserError(
            f"batch_size={task.batch_size} is no multiple of the {at_once} sequences taken at once "
            f"({machine.copies} devices a stage, micro_batch={task.micro_batch}): choose one"
        )
    check_schedule(machine.schedule, stages, task.batch_size // at_once)
    return task.batch_size // at_once


def step(task: Task, machine: Machine) -> Step:
    """Raises UserError where the layout does not divide or the hardware lacks a figure."""
    count, network, stages = micro_batches(task, machine), machine.network, machine.pipeline_parallel
    speeds = Speeds.of(machine.hardware, task.model, task.fp8, task.kernel)
    dense, experts = _parameters(task, machine)
    held = stages_held(machine.schedule, stages)
    tokens = task.micro_batch * task.sequence_length  # of a micro-batch
    moe = task.model.moe
    devices = 1.0 if moe is None else devices_visited(moe, machine.expert_parallel)
    done = work(
        task.model,
        task.sequence_length,
        task.vocab_size,
        speeds,
        fp8=task.fp8,
        kernel=task.kernel,
        devices=devices,
    )
    parts = {name: each * (tokens / stages) for name, each in done.items()}
    summed = _summed_apart(task) / stages if task.fp8 else dense + experts
    parts[MEMORY] += Passes(weights=summed * GRADIENT_SUM_BYTES / speeds.memory)
    computing = sum(parts.values(), Passes())
    exchange = _exchange(task, machine, network, tokens)
    hides = machine.schedule == "dualpipe" and stages > 1 and exchange.seconds > 0
    lent = LENT_MULTIPROCESSORS / (1 - LENT_MULTIPROCESSORS) if hides else 0.0
    slower = sum((each.seconds for name, each in parts.items() if name != MEMORY)) * lent
    alone = alone_chunks(machine.schedule, stages)  # forward, and as many backward
    overlapped = count - alone
    both = 2 * exchange.seconds  # forward and backward
    behind = computing.seconds + slower if hides else _behind_shared_experts(task, speeds, tokens / stages, exchange)
    seen = max(0.0, both - behind)
    shown = overlapped * seen + alone * both
    uneven = _slowest_stage(task, stages) - 1

    link = network.in_node if machine.num_devices <= network.devices_per_node else network.between_nodes
    transfer = 0.0 if stages == 1 else 2 * tokens * task.model.hidden_size * WEIGHT / link
    backward = computing.inputs + computing.weights
    one_way = exchange.seconds if hides else seen / 2
    chunk = Chunk(computing.forward + one_way, backward + one_way, computing.weights, computing.seconds + slower + seen)
    gathers, sums = _synchronised(machine, network, dense * held, experts * held)
    each_micro_batch = machine.sharding == "fsdp2"
    gathered = min(gathers, computing.seconds) if each_micro_batch else 0.0
    share = exchange.dispatch / exchange.seconds if exchange.seconds else 0.0
    exposed = {name: count * each.seconds for name, each in parts.items()} | {
        LENT: overlapped * slower,
        UNEVEN: (count * computing.seconds + overlapped * slower) * uneven,
        DISPATCH: shown * share,
        COMBINE: shown * (1 - share),
        TRANSFERS: (alone if hides else count) * transfer,
        BUBBLES: bubble_seconds(machine.schedule, stages, chunk),
        SHARDS: count * (gathers - gathered) if each_micro_batch else gathers,
        REPLICAS: sums,
        OPTIMIZER: _optimizer_bytes(machine, dense * held, experts * held) / speeds.memory,
    }
    hidden = {
        DISPATCH: (count * both - shown) * share,
        COMBINE: (count * both - shown) * (1 - share),
        TRANSFERS: overlapped * transfer if hides else 0.0,
        SHARDS: count * gathered,
    }
    return Step(
        {name: seconds for name, seconds in exposed.items() if seconds > 0},
        {name: seconds for name, seconds in hidden.items() if seconds > 0},
        count,
        _state_bytes(machine, dense * held, experts * held),
        task.batch_size * task.sequence_length,
    )


def _parameters(task: Task, machine: Machine) -> tuple[float, float]:
    """Of one stage on one device: those that every copy has, and its routed experts."""
    counts = [main_parameters(task.model, task.vocab_size), mtp_parameters(task.model)]
    routed = sum(parts.get(ROUTED_EXPERTS, 0) for parts in counts)
    rest = sum(sum(parts.values()) for parts in counts) - routed
    return rest / machine.pipeline_parallel, routed / machine.pipeline_parallel / machine.expert_parallel


def _summed_apart(task: Task) -> float:
    """Parameters whose products are not in FP8: the FP8 rates of weight gradients hold the sum with earlier ones."""
    parts = (main_parameters(task.model, task.vocab_size), mtp_parameters(task.model))
    heads = (1 + task.model.mtp_depth) * task.vocab_size * task.model.hidden_size
    return heads + sum(of_parts.get(ROUTER, 0) for of_parts in parts)


def _behind_shared_experts(task: Task, speeds: Speeds, tokens: float, exchange: Exchange) -> float:
    """Seconds of a micro-batch's all-to-all, both ways, in which shared experts are at work."""
    shared = sum(
        parts.get(SHARED_EXPERTS, 0.0)
        for parts in (
            main_forward_flops(task.model, task.sequence_length, task.vocab_size),
            mtp_forward_flops(task.model, task.sequence_length, task.vocab_size),
        )
    )
    return 2 * min(exchange.seconds, tokens * shared / speeds.dense[0])


def _exchange(task: Task, machine: Machine, network: Network, tokens: int) -> Exchange:
    """Of a micro-batch in one stage, one way."""
    moe = task.model.moe
    if moe is None:
        return Exchange(0.0, 0.0)
    each = network.exchange(task.model.hidden_size, moe, machine.expert_parallel, dispatch_bytes(task.fp8))
    layers = sum(count for is_moe, count in all_layers(task.model) if is_moe) / machine.pipeline_parallel
    return Exchange(each.dispatch * tokens * layers, each.combine * tokens * layers)


def _slowest_stage(task: Task, stages: int) -> float:
    """Its time over the mean: layers go whole to stages, and a head is taken to be worth the layers it has less."""
    layers = sum(count for _, count in all_layers(task.model))
    heads = 1 + task.model.mtp_depth
    return max(1.0, -(-layers // stages) * stages / (layers + heads)) if stages > 1 else 1.0


def _synchronised(machine: Machine, network: Network, dense: float, experts: float) -> tuple[float, float]:
    """Seconds of gathers and reduce-scatters (a step; with fsdp2 a micro-batch), and of all-reduces."""
    groups = ((dense, machine.copies, 1), (experts, machine.copies // machine.expert_parallel, machine.expert_parallel))
    gathers = sums = 0.0
    for parameters, members, apart in groups:
        if machine.sharding == "ddp":
            sums += 2 * network.gather_seconds(parameters * GRADIENT, members, apart)
        else:
            weights = WEIGHT * (2 if machine.sharding == "fsdp2" else 1)  # gathered forward and backward
            gathers += network.gather_seconds(parameters * (weights + GRADIENT), members, apart)
    return gathers, sums


def _shares(machine: Machine, dense: float, experts: float) -> float:
    """Parameters whose states one device keeps where they are cut over the copies."""
    return dense / machine.copies + experts / (machine.copies // machine.expert_parallel)


def _optimizer_bytes(machine: Machine, dense: float, experts: float) -> float:
    """Read and written for a step: states both, gradients, weights."""
    own = dense + experts if machine.sharding == "ddp" else _shares(machine, dense, experts)
    return own * (2 * STATES + GRADIENT + WEIGHT)


def _state_bytes(machine: Machine, dense: float, experts: float) -> float:
    """Weights, gradients and optimizer states on one device; activations are not among them."""
    own, everything = _shares(machine, dense, experts), dense + experts
    return {
        "ddp": everything * (WEIGHT + GRADIENT + STATES),
        "zero1": everything * (WEIGHT + GRADIENT) + own * STATES,
        "fsdp2": own * (WEIGHT + GRADIENT + STATES),
    }[machine.sharding]
