"""The machine a run finds itself on: devices, processes, threads, number format and determinism.

What was asked for is checked against what there is. `accelerate launch` sets OMP_NUM_THREADS=1 and, on a CPU, can start
one process where several were asked for; torchrun on a CPU leaves accelerate believing it is alone. Both are put right
or refused here, before anything is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from moe_train.config import AdamWConfig, OptimizerConfig, RunConfig
from moe_train.cost.layout import Layout
from moe_train.errors import UserError, one_line
from moe_train.gpu import takes_gpu
from moe_train.kernels.cpu import library as cpu_kernels
from moe_train.machine import cores_here
from moe_train.model.transformer import Transformer
from moe_train.parallel.agreement import check_agreement
from moe_train.parallel.communication import Communication
from moe_train.parallel.layouts import layout_of, note_on_experts
from moe_train.parallel.meshes import build_meshes
from moe_train.parallel.spread import Replicated, Spread
from moe_train.precision.support import multiplies_bfloat16, runs_triton
from moe_train.training.allocator import keep_freed_memory


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
    expected = _count_from_environment("WORLD_SIZE")
    _refuse_layouts_of_accelerate()
    _refuse_another_device()
    _refuse_tasks_that_do_not_know_each_other()
    _check_meeting_place(expected)
    _refuse_lost_processes(expected)
    if not on_gpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # otherwise accelerate takes torchrun's CPU processes for single runs
        keep_freed_memory()
    if expected == 1:
        _leave_group_of_one()
    num_threads = set_threads(config.num_threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    device_name = torch.cuda.get_device_name() if on_gpu else cpu_name()
    dtype, note = _choose_dtype(config, on_gpu, device_name)
    kernels_note = None if on_gpu else cpu_kernels.use(config.cpu_kernels, in_bf16=dtype is torch.bfloat16)
    # torch 2.13 renamed the option, torch 2.11 knows the old name only.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    timeout = config.parallel.timeout_seconds
    with _together(expected, timeout):
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
    on_a_machine = _count_from_environment("LOCAL_WORLD_SIZE")
    layout = layout_of(config.parallel, config.model.resolved(), expected, on_a_machine)
    experts_note = note_on_experts(layout, config.model.resolved(), on_a_machine)
    share = config.batch_size // expected
    if config.batch_size % expected:
        raise UserError(
            f"batch_size={config.batch_size} does not divide among {expected} processes: choose a multiple, "
            "or as many processes as divide it"
        )
    if config.batch_ramp and config.batch_ramp.start % expected:
        raise UserError(
            f"batch_ramp.start={config.batch_ramp.start} does not divide among {expected} processes: choose a "
            "multiple, or as many processes as divide it"
        )
    if config.micro_batch_size and share % config.micro_batch_size:
        raise UserError(
            f"micro_batch_size={config.micro_batch_size} does not divide a process's share of "
            f"batch_size={config.batch_size} "
            f"({share} sequences): choose a divisor of {share}"
        )
    return Runtime(
        accelerator=accelerator,
        device_type=device_type,
        device_name=device_name,
        num_threads=num_threads,
        cpu_kernels=None if on_gpu else "torch" if cpu_kernels.in_use() is None else "compiled",
        cuda_graphs=_choose_graphs(config, on_gpu, expected),
        dtype=dtype,
        layout=layout,
        fp8_dispatch=config.parallel.dispatch_format == "fp8",
        timeout_seconds=timeout,
        hosts=_host_group(timeout) if expected > 1 else None,
        communication=communication,
        notes=tuple(each for each in (note, kernels_note, experts_note) if each),
    )


@contextlib.contextmanager
def _together(processes: int, timeout: float) -> Iterator[None]:
    """Within, the processes of a run find each other. Raises UserError where they do not."""
    try:
        yield
    except (torch.distributed.DistError, RuntimeError) as error:
        if processes == 1 or isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"the port of {where}, where processes are to meet, is in use: choose another with MASTER_PORT= or "
                "torchrun's --master-port, or let torchrun --standalone find one"
            ) from None
        raise UserError(
            f"{processes} processes did not come together at {where} within {timeout:g} s "
            f"({one_line(error)[:200]}): start the missing ones, and see that all reach it"
        ) from None


def _host_group(timeout_seconds: float) -> torch.distributed.ProcessGroup:
    timeout = datetime.timedelta(seconds=timeout_seconds)
    group: torch.distributed.ProcessGroup = torch.distributed.new_group(backend="gloo", timeout=timeout)
    return group


def _refuse_lost_processes(expected: int) -> None:
    # `accelerate launch --num_processes N` sets these for N > 1, then starts a single process: with --cpu, and where
    # there are fewer than two GPUs or its configuration names no kind of several.
    launched = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
    if expected == 1 and "WORLD_SIZE" not in os.environ and launched:
        raise UserError(
            "several processes were asked for and accelerate started one (with --cpu, or without --multi_gpu): "
            "use torchrun --standalone --nproc-per-node N train.py"
        )


def _leave_group_of_one() -> None:
    """What torchrun sets for a single process: accelerate would wrap the model in DDP, for nobody to exchange with."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def _refuse_layouts_of_accelerate() -> None:
    """Those of its configuration file would wrap the model in their own way, or on a CPU in none and say nothing."""
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true"):
            raise UserError(
                f"accelerate was set up for {name}: choose parallel= (fsdp2, ep, …) instead, and launch without it "
                "(accelerate launch --multi_gpu, or torchrun)"
            )


def _refuse_another_device() -> None:
    """accelerate would move the model there and leave torch's own device as it is: another's name, memory and waits."""
    device = os.environ.get("ACCELERATE_TORCH_DEVICE")
    if device:
        raise UserError(
            f"the environment has ACCELERATE_TORCH_DEVICE={device}: unset it, and choose a GPU with "
            "CUDA_VISIBLE_DEVICES, or the CPU with ACCELERATE_USE_CPU=true"
        )


def _refuse_tasks_that_do_not_know_each_other() -> None:
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"srun started {tasks} tasks, each of which would make this run: give it one task a node "
            "(hydra.launcher.tasks_per_node=1), and accelerate launch in it for several processes"
        )


def _check_meeting_place(processes: int) -> None:
    if processes == 1:
        return
    rank, port = (os.environ.get(name, "") for name in ("RANK", "MASTER_PORT"))
    for name, fits, wanted in (
        ("RANK", rank.isdigit() and int(rank) < processes, f"this process's number, below WORLD_SIZE={processes}"),
        ("MASTER_ADDR", bool(os.environ.get("MASTER_ADDR")), "the host of process 0"),
        ("MASTER_PORT", port.isdigit() and 0 < int(port) < 65536, "a free port of it, the same for all"),
    ):
        if not fits:
            raise UserError(
                f"the environment has {name}={os.environ.get(name, '')}: it has to be {wanted}; torchrun and "
                "accelerate launch set it"
            )


def set_threads(asked: int | None) -> int:
    """As many as asked for; else OMP_NUM_THREADS; else all cores, shared among the processes of this machine.

    accelerate and torchrun set OMP_NUM_THREADS to 1 when nobody has; a 1 is therefore not taken for a wish.
    Raises UserError where there are fewer cores than asked for.
    """
    wished = _count_from_environment("OMP_NUM_THREADS")
    cores = cores_here()
    local_processes = _count_from_environment("LOCAL_WORLD_SIZE")
    if asked is not None and asked > cores:
        raise UserError(
            f"num_threads={asked} is more than the {cores} cores of this machine: lower it or leave it null"
        )
    threads = asked or (wished if wished > 1 else max(1, cores // local_processes))
    torch.set_num_threads(threads)
    return threads


def _count_from_environment(name: str) -> int:
    text = os.environ.get(name) or "1"
    if not text.isdigit() or int(text) == 0:
        raise UserError(f"the environment's {name}={text} is no whole number above 0: correct or unset it")
    return int(text)


def _choose_dtype(config: RunConfig, on_gpu: bool, device_name: str) -> tuple[torch.dtype, str | None]:
    asked = config.precision.compute_dtype
    native = multiplies_bfloat16("cuda" if on_gpu else "cpu")
    if asked == "auto":
        name = "BF16" if native else "FP32"
        why = "the device multiplies it natively" if native else "the device has no native BF16"
        key = "precision=auto" if config.precision.name == "auto" else "precision.compute_dtype=auto"
        return (torch.bfloat16 if native else torch.float32), f"{key} took {name}: {why}"
    if asked == "bfloat16" and on_gpu and not native:
        raise UserError(
            f"precision={config.precision.name}: {device_name} has no BF16 units; use precision=fp32 or auto"
        )
    return getattr(torch, asked), None


def _choose_graphs(config: RunConfig, on_gpu: bool, processes: int) -> bool:
    """Raises UserError where they were asked for and cannot be had."""
    obstacle = None
    if not on_gpu:
        obstacle = "there is no CUDA device"
    elif processes > 1:
        obstacle = "a graph is of one process, and there are several"
    elif config.model.resolved().dropout:
        obstacle = "dropout draws its masks anew in every step"
    elif _counts_on_host(config.optimizer):
        obstacle = "moments in BF16 count their steps on the host"
    if config.cuda_graphs == "always" and obstacle:
        raise UserError(f"cuda_graphs=always: {obstacle}; use auto or never")
    return config.cuda_graphs != "never" and obstacle is None


def _counts_on_host(optimizer: OptimizerConfig) -> bool:
    """Whether an optimizer on a GPU does: with moments in BF16, but for AdamW by its kernel (training/adamw.py)."""
    at_random = optimizer.stochastic_rounding
    by_kernel = isinstance(optimizer, AdamWConfig) and not at_random and runs_triton(torch.device("cuda"))
    return optimizer.moments != "float32" and not by_kernel


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
