"""What a launcher left in the environment: put right or refused before anything is loaded.

`accelerate launch` sets OMP_NUM_THREADS=1 and, on a CPU, can start one process where several were asked for; torchrun
on a CPU leaves accelerate believing it is alone; srun starts tasks that do not know of each other.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from moe_train.errors import UserError, is_a_number, one_line

_YES = ("1", "true", "t", "yes", "y", "on")  # to accelerate


def processes_launched(on_gpu: bool) -> int:
    """How many processes make this run, the environment ready for accelerate. Raises UserError."""
    processes = count_from_environment("WORLD_SIZE")
    _refuse_layouts_of_accelerate()
    _refuse_another_device()
    _refuse_tasks_that_do_not_know_each_other()
    _check_meeting_place(processes)
    _refuse_lost_processes(processes)
    if not on_gpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # otherwise accelerate takes torchrun's CPU processes for single runs
    if processes == 1:
        _leave_group_of_one()
    return processes


def count_from_environment(name: str) -> int:
    text = os.environ.get(name) or "1"
    if not is_a_number(text) or int(text) == 0:
        raise UserError(f"the environment's {name}={text} is no whole number above 0: correct or unset it")
    return int(text)


@contextlib.contextmanager
def together(processes: int, timeout: float) -> Iterator[None]:
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
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in _YES:
            raise UserError(
                f"accelerate was set up for {name}: choose parallel= (fsdp2, ep, …) instead, and launch without it "
                "(accelerate launch --multi_gpu, or torchrun)"
            )


def _refuse_another_device() -> None:
    """accelerate would move the model there and leave torch's own device as it is: another's name, memory and waits."""
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() not in ("", "no"):
        raise UserError(
            f"the environment has ACCELERATE_DYNAMO_BACKEND={compiler}: unset it, or answer no to accelerate config's "
            "question about dynamo; a run's kernels are chosen by cpu_kernels= and cuda_graphs="
        )
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
        ("RANK", is_a_number(rank) and int(rank) < processes, f"this process's number, below WORLD_SIZE={processes}"),
        ("MASTER_ADDR", bool(os.environ.get("MASTER_ADDR")), "the host of process 0"),
        ("MASTER_PORT", is_a_number(port) and 0 < int(port) < 65536, "a free port of it, the same for all"),
    ):
        if not fits:
            raise UserError(
                f"the environment has {name}={os.environ.get(name, '')}: it has to be {wanted}; torchrun and "
                "accelerate launch set it"
            )
