"""What a run computes with: threads, number format, graphs. What was asked for is held against what there is."""

from __future__ import annotations

import torch

from moe_train.config import AdamWConfig, OptimizerConfig, RunConfig
from moe_train.errors import UserError
from moe_train.machine import cores_here
from moe_train.precision.support import multiplies_bfloat16, runs_triton
from moe_train.training.launched import count_from_environment


def set_threads(asked: int | None) -> int:
    """As many as asked for; else OMP_NUM_THREADS; else all cores, shared among the processes of this machine.

    accelerate and torchrun set OMP_NUM_THREADS to 1 when nobody has; a 1 is therefore not taken for a wish.
    Raises UserError where there are fewer cores than asked for.
    """
    wished = count_from_environment("OMP_NUM_THREADS")
    cores = cores_here()
    local_processes = count_from_environment("LOCAL_WORLD_SIZE")
    if wished > cores and asked is None:
        raise UserError(
            f"OMP_NUM_THREADS={wished} is more than the {cores} cores of this machine: lower or unset it, or give "
            "num_threads="
        )
    if asked is not None and asked > cores:
        raise UserError(
            f"num_threads={asked} is more than the {cores} cores of this machine: lower it or leave it null"
        )
    threads = asked or (wished if wished > 1 else max(1, cores // local_processes))
    torch.set_num_threads(threads)
    return threads


def choose_dtype(config: RunConfig, on_gpu: bool, device_name: str) -> tuple[torch.dtype, str | None]:
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


def choose_graphs(config: RunConfig, on_gpu: bool, processes: int) -> bool:
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
