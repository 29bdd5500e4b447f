"""The machine a run finds itself on: devices, processes and their layout, determinism.

What a launcher left in the environment is launched.py's, what a run computes with compute.py's.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from moe_train.config import RunConfig
from moe_train.cost.layout import Layout
from moe_train.errors import UserError
from moe_train.gpu import takes_gpu
from moe_train.kernels.cpu import library as cpu_kernels
from moe_train.machine import cpu_name
from moe_train.model.transformer import Transformer
from moe_train.parallel.agreement import check_agreement
from moe_train.parallel.communication import Communication
from moe_train.parallel.layouts import layout_of, note_on_experts
from moe_train.parallel.meshes import build_meshes
from moe_train.parallel.spread import Replicated, Spread
from moe_train.training.allocator import keep_freed_memory
from moe_train.training.compute import choose_dtype, choose_graphs, set_threads
from moe_train.training.launched import count_from_environment, processes_launched, together


@dataclasses.dataclass(frozen=True)
class Runtime:
    """The devices of a run and how its matrix products are done."""

    accelerator: Accelerator
    device_type: Literal["cpu", "cuda"]
    device_name: str
    num_threads: int
    cpu_kernels: Literal["compiled", "torch"] | None  # None: on a GPU
    cuda_graphs: bool  # a step is one
    dtype: torch.dtype  # of matrix products
    layout: Layout  # over the processes
    fp8_dispatch: bool  # tokens travel to experts in FP8
    timeout_seconds: float  # that a process waits for the others
    hosts: torch.distributed.ProcessGroup | None  # all processes over their hosts' network; None: there is one
    communication: Communication | None  # what is exchanged; None: there is one process
    notes: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over the ranks."""
        if self.world_size == 1:
            return tensor
        total: torch.Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return total

    def exchanges_counted(self, timed: bool) -> AbstractContextManager[None]:
        """A training step, for what it exchanges with other processes."""
        return nullcontext() if self.communication is None else self.communication.step(timed)

    def new_host_group(self) -> torch.distributed.ProcessGroup:
        """All processes over their hosts' network, whatever their devices use, for what is no part of a step.

        A collective call.
        """
        group = _host_group(self.timeout_seconds)
        if self.communication is not None:
            self.communication.apart(group)
        return group

    @property
    def cuts(self) -> bool:
        """Whether a process holds less than the whole model."""
        return self.layout.name not in ("single", "ddp")

    def spread_out(self, model: Transformer) -> tuple[Spread, int]:
        """`model` on the devices of the layout, and which part of what is cut this process has.

        It comes from the host or, where it is cut, from the meta device.
        """
        if not self.cuts:
            return Replicated(model, self.accelerator), 0
        from moe_train.parallel.sharded import Sharded  # half a second to load

        meshes = build_meshes(self.layout, self.device_type)
        sharded = Sharded(
            model,
            self.layout,
            meshes,
            self.accelerator,
            fp8_dispatch=self.fp8_dispatch,
            gathers_bf16=self.dtype is torch.bfloat16,
        )
        return sharded, meshes.rest.get_local_rank("shard")


def start_runtime(config: RunConfig) -> Runtime:
    """Join the process group if there is one and settle device, threads and precision. Raises UserError."""
    on_gpu = takes_gpu()
    expected = processes_launched(on_gpu)
    if not on_gpu:
        keep_freed_memory()
    num_threads = set_threads(config.num_threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    device_name = torch.cuda.get_device_name() if on_gpu else cpu_name()
    dtype, note = choose_dtype(config, on_gpu, device_name)
    kernels_note = None if on_gpu else cpu_kernels.use(config.cpu_kernels, in_bf16=dtype is torch.bfloat16)
    # torch 2.13 renamed the option, torch 2.11 knows the old name only.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    timeout = config.parallel.timeout_seconds
    with together(expected, timeout):
        accelerator = Accelerator(
            cpu=not on_gpu,
            mixed_precision="bf16" if dtype is torch.bfloat16 else "no",
            # Expert loads are summed over ranks by the loop; broadcasting rank 0's buffers would overwrite them.
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=timeout)),
            ],
        )
    if accelerator.num_processes != expected:
        raise UserError(
            f"{expected} processes were asked for and accelerate runs {accelerator.num_processes}: "
            "start them with torchrun --standalone --nproc-per-node N train.py"
        )
    device_type: Literal["cuda", "cpu"] = "cuda" if on_gpu else "cpu"
    if accelerator.device.type != device_type:  # what is measured would be said to be of the other
        raise UserError(
            f"accelerate took {accelerator.device.type} where {device_name} is: see what `accelerate env` says, and "
            "start it without an accelerate configuration"
        )
    communication = None
    if expected > 1:
        communication = Communication(accelerator.device.type)
        check_agreement(config)
    on_a_machine = count_from_environment("LOCAL_WORLD_SIZE")
    layout = layout_of(config.parallel, config.model.resolved(), expected, on_a_machine)
    experts_note = note_on_experts(layout, config.model.resolved(), on_a_machine)
    _check_shares(config, expected)
    return Runtime(
        accelerator=accelerator,
        device_type=device_type,
        device_name=device_name,
        num_threads=num_threads,
        cpu_kernels=None if on_gpu else "torch" if cpu_kernels.in_use() is None else "compiled",
        cuda_graphs=choose_graphs(config, on_gpu, expected),
        dtype=dtype,
        layout=layout,
        fp8_dispatch=config.parallel.dispatch_format == "fp8",
        timeout_seconds=timeout,
        hosts=_host_group(timeout) if expected > 1 else None,
        communication=communication,
        notes=tuple(each for each in (note, kernels_note, experts_note) if each),
    )


def _check_shares(config: RunConfig, processes: int) -> None:
    """Raises UserError where a batch does not divide among them."""
    share = config.batch_size // processes
    if config.batch_size % processes:
        raise UserError(
            f"batch_size={config.batch_size} does not divide among {processes} processes: choose a multiple, "
            "or as many processes as divide it"
        )
    if config.batch_ramp and config.batch_ramp.start % processes:
        raise UserError(
            f"batch_ramp.start={config.batch_ramp.start} does not divide among {processes} processes: choose a "
            "multiple, or as many processes as divide it"
        )
    if config.micro_batch_size and share % config.micro_batch_size:
        raise UserError(
            f"micro_batch_size={config.micro_batch_size} does not divide a process's share of "
            f"batch_size={config.batch_size} "
            f"({share} sequences): choose a divisor of {share}"
        )


def _host_group(timeout_seconds: float) -> torch.distributed.ProcessGroup:
    timeout = datetime.timedelta(seconds=timeout_seconds)
    group: torch.distributed.ProcessGroup = torch.distributed.new_group(backend="gloo", timeout=timeout)
    return group
