"""Which devices jobs are spread over, how many run at a time, and what each may see and use."""

from __future__ import annotations

import os
from dataclasses import dataclass

from moe_train.errors import UserError
from moe_train.gpu import takes_gpu
from moe_train.machine import cores_here


@dataclass(frozen=True)
class Devices:
    """GPUs by the names CUDA_VISIBLE_DEVICES knows them by; `names` is empty on a CPU, which is one device."""

    names: tuple[str, ...] = ()

    @property
    def on_gpu(self) -> bool:
        return bool(self.names)

    @property
    def count(self) -> int:
        return len(self.names) or 1

    @classmethod
    def gpus(cls, count: int) -> Devices:
        """The first of those this process sees; none: the CPU."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(index) for index in range(count)]
        return cls(tuple(names[:count]))

    def groups(self, size: int) -> list[dict[str, str]]:
        """Environments that show a job `size` devices each. On a CPU all share it. Raises UserError."""
        if not self.on_gpu:
            return [{}]
        if size > len(self.names):
            raise UserError(f"a job of {size} processes needs {size} GPUs, and {len(self.names)} are there: lower it")
        starts = range(0, len(self.names) - size + 1, size)
        return [{"CUDA_VISIBLE_DEVICES": ",".join(self.names[start : start + size])} for start in starts]


def devices_here() -> Devices:
    """Raises nothing; imports torch, which takes seconds."""
    import torch

    return Devices.gpus(torch.cuda.device_count()) if takes_gpu() else Devices()


def jobs_at_a_time(devices: Devices, asked: int | None, num_threads: int | None, processes: int = 1) -> int:
    """As asked; else one a GPU (or group of them), or as many as find cores of their own.

    num_threads: of a process; None: all cores are one job's.
    """
    if asked is not None:
        return asked
    if devices.on_gpu:
        return len(devices.groups(processes))
    return 1 if num_threads is None else max(1, cores_here() // (num_threads * processes))


def threads_of_a_job(devices: Devices, jobs: int, num_threads: int | None, processes: int = 1) -> list[str]:
    """The setting that shares a CPU's cores out among jobs that would each take all of them."""
    if devices.on_gpu or jobs == 1 or num_threads is not None:
        return []
    return [f"num_threads={max(1, cores_here() // (jobs * processes))}"]
