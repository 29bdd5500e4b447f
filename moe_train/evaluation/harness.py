"""Tasks of EleutherAI's lm-evaluation-harness on a model in Hugging Face's format.

The harness is an extra (`pip install -e ".[eval]"`). It reads the model from a local folder and runs no code from it;
a task's questions come from where its YAML says, for the harness's own tasks that is the Hugging Face hub.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

from moe_train.errors import UserError, one_line
from moe_train.gpu import takes_gpu


def require_harness() -> None:
    """Raises UserError naming the extra if the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError('harness= needs lm-evaluation-harness, which is not installed: pip install -e ".[eval]"')


def run_tasks(
    model_folder: Path, tasks: list[str], include_path: Path | None = None, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Every task's figures by name (`acc`, `acc_stderr`, …), tasks in the order of the harness.

    model_folder: as scripts/export_hf.py writes it. tasks: names, of tasks or groups. include_path: a folder of task
    YAMLs, looked into before the harness's own. limit: questions of each task, None for all. Raises UserError if a
    task is not known or its questions cannot be had.
    """
    require_harness()
    if not (model_folder / "config.json").is_file():
        raise UserError(
            f"{model_folder} holds no exported model (no config.json): python scripts/export_hf.py makes one"
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for chatty in ("lm_eval", "datasets", "huggingface_hub"):  # the last two announce every retry
        logging.getLogger(chatty).setLevel(logging.ERROR)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    known = _known_tasks(tasks, include_path)
    model = HFLM(
        pretrained=str(model_folder.absolute()),
        device="cuda" if takes_gpu() else "cpu",
        dtype="float32",
        batch_size=8,
        trust_remote_code=False,
    )
    try:
        results = lm_eval.simple_evaluate(
            model,
            tasks=list(tasks),
            task_manager=known,
            limit=limit,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except Exception as error:  # datasets, the hub's client and the YAML's code each have their own
        raise UserError(
            f"harness={','.join(tasks)}: {type(error).__name__}: {one_line(error)[:200]}: a task of the harness takes "
            "its questions from the Hugging Face hub, so check the network, or give tasks on local files with "
            "include_path=FOLDER"
        ) from error
    return {name: _figures(figures) for name, figures in (results or {}).get("results", {}).items()}


def _known_tasks(tasks: list[str], include_path: Path | None) -> Any:
    """The harness's index with all `tasks` in it; its own 14,000 are read, in ten seconds, only where needed."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise UserError(f"include_path={include_path}: there is no such folder; give one that holds task YAMLs")
    own = str(include_path) if include_path else None
    index = TaskManager(include_path=own, include_defaults=False) if own else None
    if index is None or not set(tasks) <= set(index.all_tasks):
        index = TaskManager(include_path=own)
    for task in tasks:
        if task not in index.all_tasks:
            raise UserError(
                f"harness={task}: there is no such task: lm_eval ls tasks lists the harness's own, and "
                "include_path=FOLDER adds YAMLs of yours"
            )
    return index


def _figures(figures: dict[str, Any]) -> dict[str, float]:
    """Names without the harness's `,filter` where that is none; what is not a number (an alias, "N/A") left out."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in figures.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "sample_len"
    }
