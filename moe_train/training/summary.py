"""`summary.json`: what a run came to. What is not known is null; nothing is estimated but what is called predicted."""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from moe_train.cost.flops import parameter_counts
from moe_train.cost.fp8_operands import Fp8Kept
from moe_train.cost.kernels import Kernels
from moe_train.cost.memory import peak_training_memory
from moe_train.cost.price import JOULES_PER_KWH
from moe_train.cost.value import bits_per_byte_per_usd
from moe_train.errors import UserError
from moe_train.kernels.cpu import library
from moe_train.precision.support import runs_triton
from moe_train.tracking.console import closing_table, where_to_look
from moe_train.training.run_folder import SUMMARY
from moe_train.versions import versions_with

if TYPE_CHECKING:
    from moe_train.cost.meter import Meter
    from moe_train.training.loop import Run
    from moe_train.training.runtime import Runtime

_LIBRARIES = ("torch", "accelerate", "transformers", "datasets", "tokenizers", "wandb", "hydra-core", "numpy")


class Interrupted(UserError):
    """The run was told to end; its checkpoint is there. The exit status is the shell's for the signal."""

    def __init__(self, signal_number: int, step: int) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(f"interrupted by {name} after step {step}, which is saved: go on with resume=auto")
        self.exit_status = 128 + signal_number


def peak_memory_bytes(runtime: Runtime) -> int:
    """Largest memory so far of the device (CUDA: allocated by tensors) or of the process (CPU: resident), of rank 0."""
    if runtime.device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)


def predicted_peak_bytes(run: Run) -> int:
    """What `cost/memory.py` foretells of tensors at the peak of a step: to be held against CUDA's `peak_memory_bytes`.

    On a CPU that figure is the whole process, libraries and all, and cannot be compared.
    """
    config, runtime = run.config, run.runtime
    share = config.batch_size // runtime.world_size
    return peak_training_memory(
        run.model_config,
        run.model.vocab_size,
        sequences=run.stepper.micro_batch_size,
        sequence_length=config.data.sequence_length,
        optimizer=config.optimizer,
        compute_bytes=2 if runtime.dtype is torch.bfloat16 else 4,
        activation_checkpointing=config.activation_checkpointing,
        accumulates=share > run.stepper.micro_batch_size,
        layout=runtime.layout,
        device_type=runtime.device_type,
        kernels=_kernels(runtime.device),
        fp8=Fp8Kept.by(config.precision.fp8),
    ).bytes


def _kernels(device: torch.device) -> Kernels:
    """Those that this process takes."""
    if device.type == "cuda":
        return Kernels.TRITON if runs_triton(device) else Kernels.TORCH
    return Kernels.TORCH if library.in_use() is None else Kernels.COMPILED


def resolved(run: Run) -> dict[str, Any]:
    """What `auto` came to and the size of the model, for those who compare runs by their settings."""
    counts, moe = parameter_counts(run.model_config, run.model.vocab_size), run.model_config.moe
    automatic = run.config.precision.name == "auto"
    return {
        "precision": run.compute_format if automatic else run.config.precision.name,
        "num_experts": 0 if moe is None else moe.num_experts,
        "hardware": run.account.hardware.name,
        "num_devices": run.runtime.world_size,
        "total_params": counts.total,
        "active_params": counts.active,
        "flops_per_token": run.account.meter.work.flops,
    }


def build(run: Run, status: str) -> dict[str, Any]:
    """The figures of a run as they stand."""
    account, evaluation = run.account, run.evaluation
    meter, hardware, price = account.meter.stopped(), account.hardware, account.price
    usd_total, joules = meter.usd_total, account.joules()
    counts = parameter_counts(run.model_config, run.model.vocab_size)
    return {
        "status": status,
        "stopped_by": run.stopped_by,
        "steps": run.steps_done,
        "tokens": meter.tokens,
        "total_params": counts.total,
        "active_params": counts.active,
        "flops_per_token": meter.work.flops,
        "recomputed_flops_per_token": meter.work.recomputed_flops,
        "train_seconds": meter.train_seconds,
        "wall_seconds": meter.wall_seconds,
        "lost_seconds": account.lost_seconds,
        "startup_seconds": run.startup_seconds,
        "evaluation_seconds": run.closing.evaluation_seconds,
        "tokens_per_second": meter.tokens_per_second,
        "model_flops_utilization": meter.model_flops_utilization,
        "hardware_flops_utilization": meter.hardware_flops_utilization,
        "mixed_precision_utilization": meter.mixed_precision_utilization,
        "peak_tflops": account.peak,
        "peak_source": account.peak_source,
        "final_train_loss": run.train_loss,
        "final_max_violation": run.last_row.get("moe/max_violation"),
        "final_dropped_fraction": run.last_row.get("moe/dropped_fraction"),
        "val_mtp_loss": run.last_row.get("val/mtp_loss"),
        "val_loss": evaluation.loss if evaluation else None,
        "val_bits_per_byte": evaluation.bits_per_byte if evaluation else None,
        "val_tokens": evaluation.tokens if evaluation else None,
        "val_complete": evaluation.complete if evaluation else None,
        "unigram_bits_per_byte": run.data.meta["val_unigram_bits_per_byte"],
        "usd_train": meter.usd_train,
        "usd_total": usd_total,
        "usd_per_million_tokens": meter.usd_per_million_tokens,
        "usd_per_million_tokens_all_in": meter.usd_per_million_tokens_all_in,
        "bits_per_byte_per_usd": bits_per_byte_per_usd(evaluation.bits_per_byte if evaluation else None, usd_total),
        "cost_basis": price.basis,
        "price_usd_per_hour": price.usd_per_hour,
        "price_source": price.source,
        "price_date": price.date,
        "price_notes": account.price_notes,  # e.g. that it is more than a year old
        "usd_per_kwh": price.usd_per_kwh,
        **_communication(meter),
        "energy_kwh": None if joules is None else joules / JOULES_PER_KWH,
        "energy_source": account.energy.source,
        "hardware": hardware.name,
        "earlier_hardware": account.earlier_hardware,
        "device_name": run.runtime.device_name,
        "num_devices": run.runtime.world_size,
        "parallel": run.runtime.layout.name,
        "num_threads": run.runtime.num_threads,
        "cpu_kernels": run.runtime.cpu_kernels,
        "cuda_graphs": run.stepper.captures,
        "precision": run.config.precision.name,
        "compute_dtype": str(run.runtime.dtype).removeprefix("torch."),
        "fp8_modules_in_compute_format": run.fp8_health.in_compute_format,
        "peak_memory_bytes": peak_memory_bytes(run.runtime),
        "predicted_peak_tensor_bytes": predicted_peak_bytes(run),
        "corpus": run.config.data.name,
        "corpus_fingerprint": run.data.fingerprint,
        "config_hash": run.config.config_hash(),
        "seed": run.config.seed,
        "versions": versions_with(*_LIBRARIES),
    }


def _communication(meter: Meter) -> dict[str, Any]:
    """Of a process and step of this attempt, and dollars of all; null for one process."""
    exchanged = meter.exchanged
    return {
        "communication_bytes_per_step": exchanged and exchanged.bytes_a_step,
        "communication_exposed_fraction": exchanged and exchanged.exposed_fraction,
        "communication_by_kind": exchanged and exchanged.a_step(),
        "communication_bytes_outside_steps": exchanged and exchanged.sent_outside,
        "usd_communication": meter.usd_communication,
    }


def write(run_folder: Path, summary: dict[str, Any]) -> None:
    temporary = run_folder / f".{SUMMARY}"
    temporary.write_text(json.dumps(summary, indent=1) + "\n")
    temporary.replace(run_folder / SUMMARY)


def show(summary: dict[str, Any], run_folder: Path, wandb_location: str | None) -> None:
    """The closing table and where to look further, on stdout."""
    console = Console()
    console.print(closing_table(summary))
    for line in where_to_look(run_folder, wandb_location):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
