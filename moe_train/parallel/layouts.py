"""Which layout a run has over its processes, or why it cannot have the one asked for.

    layout     an expert                   any other weight            a gradient is summed
    ddp        on every process            on every process            by all-reduce
    fsdp2      cut over all                cut over all                by reduce-scatter
    hybrid     cut over a group            cut over a group            by reduce-scatter, then all-reduce over groups
    ep         on one process of E         on every process            by all-reduce; an expert's over its holders
    ep_fsdp2   on N/E processes of N, cut  cut over all                by reduce-scatter; an expert's over its N/E

Every process works on sequences of its own, whole ones, in all of them. In `ep…` the E processes that share out the
experts are consecutive, so that they are on one machine where it holds E; rank r of them has the r-th part of the
experts, which are whole groups or parts of one where routing is limited to groups (DeepSeek-V3, arXiv 2412.19437,
section 2.1.2).
"""

from __future__ import annotations

from moe_train.config import ModelConfig, ParallelConfig
from moe_train.cost.layout import Layout
from moe_train.errors import UserError


def layout_of(config: ParallelConfig, model: ModelConfig, processes: int, on_a_machine: int) -> Layout:
    """The layout of `model` over the `processes` there are, `on_a_machine` of them on each.

    Raises UserError for what cannot be held.
    """
    name = config.layout
    if config.processes is not None and config.processes != processes:
        raise UserError(
            f"parallel.processes={config.processes} were asked for and {processes} started: start as many "
            "(torchrun --nproc-per-node N train.py), or leave it null"
        )
    if name == "auto":
        name = "ddp" if processes > 1 else "single"
    if name == "single" and processes > 1:
        raise UserError(f"parallel=single is one process, and {processes} were started: choose ddp, fsdp2 or ep")
    if name != "single" and processes == 1:
        raise UserError(
            f"parallel={name} is for several processes, and one was started: torchrun --standalone --nproc-per-node 2 "
            "train.py … starts two; parallel=auto takes what there is"
        )
    shard = processes if name in ("fsdp2", "ep_fsdp2") else 1
    if name == "hybrid":
        shard = config.shard or on_a_machine
        if processes % shard:
            raise UserError(f"parallel.shard={shard} does not divide the {processes} processes: choose a divisor")
    experts = (config.expert_parallel or processes) if name in ("ep", "ep_fsdp2") else 1
    if processes % experts:
        raise UserError(
            f"parallel.expert_parallel={experts} does not divide the {processes} processes: choose a divisor of it"
        )
    if name in ("ep", "ep_fsdp2"):
        _check_experts(name, experts, model)
    if config.dispatch_format == "fp8" and experts == 1:
        raise UserError(
            "parallel.dispatch_format=fp8 does nothing where every process has all experts: choose an "
            "expert_parallel above 1, or dispatch_format=compute"
        )
    return Layout(name, processes, shard, experts)


def _check_experts(name: str, parts: int, model: ModelConfig) -> None:
    moe = model.moe
    if moe is None:
        raise UserError(f"parallel={name} shares out experts and the model has none: choose fsdp2 or ddp")
    if moe.num_experts % parts:
        possible = ", ".join(str(n) for n in range(1, parts) if moe.num_experts % n == 0)
        raise UserError(
            f"parallel.expert_parallel={parts} does not divide model.moe.num_experts={moe.num_experts}: "
            f"choose one of {possible} with a number of processes it divides, or another number of experts"
        )
    if moe.topk_group < moe.n_group and moe.n_group % parts and parts % moe.n_group:
        raise UserError(
            f"parallel.expert_parallel={parts} cuts across the model.moe.n_group={moe.n_group} groups that tokens are "
            "limited to: choose a divisor or a multiple of n_group"
        )


def note_on_experts(layout: Layout, model: ModelConfig, on_a_machine: int) -> str | None:
    """Where the experts are and how far a token can have to travel; None where every process has them all."""
    moe, parts = model.moe, layout.expert_parallel
    if moe is None or parts == 1:
        return None
    text = f"{moe.num_experts // parts} of {moe.num_experts} experts a process, in parts of {parts} processes"
    machines = -(-parts // on_a_machine)
    if machines == 1:
        return f"{text}: a token stays on its machine"
    reached = machines
    if moe.topk_group < moe.n_group:
        machines_of_a_group = max(1, -(-machines // moe.n_group))
        reached = min(machines, moe.topk_group * machines_of_a_group)
    return f"{text}: a token reaches at most {reached} of {machines} machines"
