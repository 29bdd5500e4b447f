"""What is compared: one number a run, from its summary, its curve, its checkpoint or text generated with it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_train.claims.results import Folder, Result
from moe_train.cli import write_json
from moe_train.compose import CONFIGS
from moe_train.config.claim import Measure
from moe_train.config.model import ModelConfig
from moe_train.cost.ledger import read_account
from moe_train.errors import UserError, one_line
from moe_train.forecast import probe as probes

GENERATE = CONFIGS.parent / "scripts" / "generate.py"
GENERATED_TOKENS = 200
_counted: dict[tuple[Path, ModelConfig], float] = {}  # by suite and model: elements of the cache

UNITS: dict[Measure, str] = {
    "val_loss": "nats a token",
    "max_violation": "MaxVio",
    "optimizer_bytes_per_param": "bytes a parameter",
    "cache_elements": "elements a token",
    "generation_speed_up": "times as fast",
    "forecast_error": "of what they took",
    "tokens_to_target": "times the tokens",
    "flops_to_target": "times the FLOPs",
    "seconds_to_target": "times the seconds",
    "usd_to_target": "times the dollars",
}


def value(measure: Measure, result: Result, folder: Folder, config_dir: Path | None = None) -> float:
    """Of one run; `config_dir`: where its claim is from. Raises UserError, in one line, where it has none."""
    if measure == "forecast_error":
        return _forecast_error(result, folder, config_dir)
    return _OF[measure](result, folder)


def _val_loss(result: Result, _: Folder) -> float:
    return float(result.summary["val_loss"])


def _max_violation(result: Result, _: Folder) -> float:
    """Over the last third of the run: balance takes time to set in."""
    rows = [row for row in result.rows if row.get("moe/max_violation") is not None]
    late = [row["moe/max_violation"] for row in rows if row["step"] > result.summary["steps"] * 2 / 3]
    if not late:
        raise UserError(f"{result.place}: arm {result.run.arm} logged no expert load: give it experts")
    return float(np.mean(late))


def _optimizer_bytes(result: Result, folder: Folder) -> float:
    """Kept beside the run, whose checkpoint may be removed then."""
    beside = Beside(result, folder, "optimizers")
    kept = beside.kept() or beside.keep({"bytes": _weighed(result)})
    return float(kept["bytes"]) / float(result.summary["total_params"])


def _weighed(result: Result) -> int:
    import torch

    from moe_train.training.checkpoints import OPTIMIZERS, checkpoint_paths

    remedy = "remove the folder, and the run is made again"
    paths = checkpoint_paths(result.folder)
    if not paths:
        raise UserError(f"{result.place} has no checkpoint to weigh: {remedy}")

    def bytes_of(node: Any) -> int:
        if isinstance(node, torch.Tensor):
            return node.numel() * node.element_size() if node.dim() else 0  # step counters are scalars
        parts = node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ()
        return sum(bytes_of(part) for part in parts)

    try:
        return bytes_of(torch.load(paths[-1] / OPTIMIZERS, weights_only=True, map_location="cpu"))
    except Exception as error:  # torch has many, by what is damaged
        raise UserError(f"{result.place}/checkpoints cannot be weighed ({one_line(error)}): {remedy}") from None


def _generated(result: Result, folder: Folder) -> dict[str, Any]:
    return generation(result, folder, speculative=result.run.config.model.mtp is not None)


def _cache_elements(result: Result, folder: Folder) -> float:
    """Shapes decide it, so one run of each model is asked: to generate with 240 runs took a quarter of an hour."""
    key = folder.path.absolute(), result.run.config.model
    if key not in _counted:
        _counted[key] = float(_generated(result, folder)["cache_elements_per_token"])
    return _counted[key]


def _speed_up(result: Result, folder: Folder) -> float:
    figures = _generated(result, folder)
    if "speed_up" not in figures:
        raise UserError(f"{result.place}: arm {result.run.arm} has no MTP module to draft with")
    return float(figures["speed_up"])


def _forecast_error(result: Result, folder: Folder, config_dir: Path | None) -> float:
    """Of twenty steps made for it alone, which are no part of the run: |forecast / took − 1| of training seconds."""
    beside = Beside(result, folder, "forecast")
    forecast = beside.kept()
    if forecast is None:
        folders = [] if config_dir is None else ["--config-dir", str(config_dir.absolute())]
        threads = [f"num_threads={result.summary['num_threads']}"]
        sys.stderr.write(f"forecasting {result.place}, arm {result.run.arm}, from twenty steps\n")
        made = probes.probe([*folders, *result.run.overrides, *threads], result.summary["tokens"])
        forecast = beside.keep(made)
    if forecast["device"] != result.summary["device_name"]:
        raise UserError(
            f"{result.place} was made on {result.summary['device_name']} and forecast on {forecast['device']}: remove "
            f"{beside.file.name}, and judge it where it was made"
        )
    return abs(float(forecast["train_seconds"]["value"]) / float(result.summary["train_seconds"]) - 1)


_OF: dict[Measure, Callable[[Result, Folder], float]] = {
    "val_loss": _val_loss,
    "max_violation": _max_violation,
    "optimizer_bytes_per_param": _optimizer_bytes,
    "cache_elements": _cache_elements,
    "generation_speed_up": _speed_up,
}


def generation(result: Result, folder: Folder, speculative: bool) -> dict[str, Any]:
    """What scripts/generate.py measured with the run, kept beside it."""
    beside = Beside(result, folder, "generation")
    return beside.kept() or beside.keep(_generate(result, speculative))


def _generate(result: Result, speculative: bool) -> dict[str, Any]:
    extra = ["speculative=true", "compare=true"] if speculative else []
    with tempfile.TemporaryDirectory() as place:
        figures = Path(place) / "figures.json"
        command: Sequence[str] = [
            *(sys.executable, str(GENERATE), f"run={result.folder}", "prompt=def ", "temperature=0"),
            *(f"max_new_tokens={GENERATED_TOKENS}", *extra, f"json={figures}"),
        ]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            last = (made.stderr.strip().splitlines() or ["it said nothing"])[-1].removeprefix("error: ")
            raise UserError(f"{result.place}: generating with arm {result.run.arm} failed: {last}")
        content: dict[str, Any] = json.loads(figures.read_text())
        return content


class Beside:
    """`runs/HASH.NAME.json`: what was measured of a run, for as long as it is that run.

    One that was made again, after its folder was removed say, is measured again: its last attempt has another id.
    """

    def __init__(self, result: Result, folder: Folder, name: str) -> None:
        self.file = folder.runs.beside(result.run.hash, f".{name}.json")
        self._attempt = [attempt.id for attempt in read_account(result.folder / "ledger.json")][-1:]

    def kept(self) -> dict[str, Any] | None:
        """None where it was not measured of this run, or what is there is damaged."""
        try:
            content: dict[str, Any] = json.loads(self.file.read_text())
            return content["measured"] if content["of_attempt"] == self._attempt else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, measured: dict[str, Any]) -> dict[str, Any]:
        write_json(self.file, {"of_attempt": self._attempt, "measured": measured})
        return measured
