"""The loss of a trained model on a text, or its score on tasks of lm-evaluation-harness.

python scripts/evaluate.py run=DIR [split=val|train] [files=GLOB] [max_tokens=N|all] [sequence_length=N] \
[in_fp8=true|false] [cpu_kernels=auto|compiled|torch] [num_threads=N] [json=FILE]
python scripts/evaluate.py run=DIR harness=TASK[,TASK] [hf=DIR] [include_path=DIR] [limit=N] [json=FILE]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

from pydantic import Field
from rich.console import Console
from rich.table import Table

from moe_train.before_torch import settle_environment
from moe_train.cli import check_json_target, parse_arguments, wants_traceback, write_json
from moe_train.errors import UsageError, reported

USAGE = "\n".join((__doc__ or "").strip().splitlines()[2:])
_OF_A_CPU = ("num_threads", "cpu_kernels")
Positive = Annotated[int, Field(gt=0)]


@dataclass
class Arguments:
    run: Path | None = None  # a run folder, or one of its checkpoints
    split: Literal["val", "train"] | None = None  # of the run's own data; val if nothing else is given
    files: str | None = None
    text_field: str | None = None  # column of jsonl and parquet
    max_tokens: Positive | Literal["all"] | None = None  # of the run's data as many as it evaluates, of files all
    sequence_length: Annotated[int, Field(gt=0, le=10**6)] | None = None
    in_fp8: bool | None = None  # None: as the run evaluates (precision.evaluate_in_fp8)
    cpu_kernels: Literal["auto", "compiled", "torch"] | None = None  # None: as the run, and so are threads
    num_threads: Positive | None = None
    harness: str | None = None
    hf: Path | None = None  # an export of the run there is already
    include_path: Path | None = None
    limit: Positive | None = None  # questions of each task
    json: Path | None = None


def main() -> None:
    settle_environment()
    arguments = parse_arguments(Arguments, sys.argv[1:], usage=USAGE)
    check_json_target(arguments.json)
    _check_combination(arguments)
    figures = _run_harness(arguments) if arguments.harness is not None else _measure_loss(arguments)
    if arguments.json:
        write_json(arguments.json, figures)


def _check_combination(arguments: Arguments) -> None:
    loss_only = ("split", "files", "text_field", "max_tokens", "sequence_length", "in_fp8", *_OF_A_CPU)
    harness_only = ("hf", "include_path", "limit")
    for name in loss_only if arguments.harness is not None else harness_only:
        if getattr(arguments, name) is not None:
            other = "leave out harness=" if arguments.harness is not None else "add harness=TASK"
            raise UsageError(f"{name}= does nothing here: {other}, or leave {name}= out")
    if arguments.split is not None and arguments.files is not None:
        raise UsageError("split= is of the run's own data and files= are others: give one of them")
    if arguments.run is None and arguments.hf is None:
        raise UsageError("run= is missing: give the folder of a run, or one of its checkpoints/step_N")


def _measure_loss(arguments: Arguments) -> dict[str, Any]:
    from moe_train.evaluation.losses import evaluate_run
    from moe_train.tracking.console import print_notes

    assert arguments.run is not None
    figures = evaluate_run(
        arguments.run.absolute(),
        split=arguments.split or "val",
        files=arguments.files,
        text_field=arguments.text_field,
        max_tokens=arguments.max_tokens,
        sequence_length=arguments.sequence_length,
        in_fp8=arguments.in_fp8,
        cpu_kernels=arguments.cpu_kernels,
        num_threads=arguments.num_threads,
    )
    print_notes(figures["notes"])
    on_a_cpu = _OF_A_CPU if figures["cpu_kernels"] else ()
    rows = {
        "text": figures["text"],
        "checkpoint": figures["checkpoint"],
        "loss": f"{figures['loss']:.4f} nats a token",
        "bits per byte": f"{figures['bits_per_byte']:.4f}",
        "measured on": f"{figures['tokens']:,} tokens, {figures['bytes']:,.0f} bytes, "
        f"{figures['sequence_length']} tokens at a time",
        "computed in": _formats(figures),
        "on": ", ".join([figures["device_name"], *(f"{key}={figures[key]}" for key in on_a_cpu)]),
    }
    for depth, loss in enumerate(figures["mtp_losses"], start=1):
        rows[f"loss of MTP module {depth}"] = f"{loss:.4f} nats a token"
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
    return figures


def _formats(figures: dict[str, Any]) -> str:
    """What the loss was computed in, and whether that is what the run was trained in."""
    wide, narrow, trained_in = (figures[key] for key in ("compute_dtype", "fp8", "trained_in_fp8"))
    if narrow:
        given_back = len(figures["fp8_modules_in_compute_format"])
        but = f"; but for {given_back} modules that the run gave back" if given_back else ""
        return f"{wide}, linear layers in FP8 ({narrow}{but})"
    return f"{wide}, not in the FP8 of its training ({trained_in}), as in_fp8=true would" if trained_in else str(wide)


def _run_harness(arguments: Arguments) -> dict[str, Any]:
    from moe_train.evaluation.harness import require_harness, run_tasks

    require_harness()
    tasks = [name.strip() for name in (arguments.harness or "").split(",") if name.strip()]
    if not tasks:
        raise UsageError("harness= names no task: give one, as harness=hellaswag, or several with commas")
    with TemporaryDirectory() as folder:
        model_folder = arguments.hf or _exported(arguments.run, Path(folder) / "model")
        results = run_tasks(model_folder, tasks, arguments.include_path, arguments.limit)
    table = Table("task", "figure", "value")
    for task, figures in results.items():
        for name, value in figures.items():
            table.add_row(task, name, f"{value:.4f}")
    Console().print(table)
    model = str(arguments.hf or arguments.run)
    return {"model": model, "limit": arguments.limit, "tasks": results}


def _exported(run: Path | None, folder: Path) -> Path:
    """The run in Hugging Face's format, without its MTP modules, which no task uses."""
    from moe_train.interop.export import export_run

    assert run is not None
    export_run(run, folder, dtype="float32", mtp="drop")
    return folder


if __name__ == "__main__":
    with reported(wants_traceback()):
        main()
