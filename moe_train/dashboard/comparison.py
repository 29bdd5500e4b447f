"""Two runs side by side: settings that differ, what each came to, and what each spent to get as far as the worse one.

The last is the fair figure: of two runs of different length the final losses say little, but where each of them reached
the loss at which the worse one ended, tokens, FLOPs, seconds and dollars can be read off both curves. These are the
decreasing ones that fit the points best (isotonic regression): on a noisy one the first lucky point would count, and an
unlucky last one of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_train.dashboard.entries import AXES, entry
from moe_train.dashboard.runs import Number, Row, Run, Unreadable, read_run, value
from moe_train.errors import UserError

ALWAYS_DIFFERENT = ("run_dir", "config_hash")
FIGURES = (
    "val_bits_per_byte",
    "val_loss",
    "train_loss",
    "tokens",
    "flops",
    "seconds",
    "train_seconds",
    "usd",
    "usd_train",
    "usd_per_million_tokens",
    "tokens_per_second",
    "energy_kwh",
)
OF_DEVICES = ("seconds", "train_seconds", "tokens_per_second", "energy_kwh")
OF_PRICES = ("usd", "usd_train", "usd_per_million_tokens")
REACHED_OVER = ("tokens", "flops", "seconds", "usd")
MIN_EVALUATIONS = 5  # fewer are too far apart to read a cost off between them
_MISSING = {"usd": "no price", "tokens": "no tokens logged", "flops": "no FLOPs logged", "seconds": "no clock logged"}


def open_run(folder: Path) -> Run:
    """Raises UserError where there is no run to compare."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give the folder of a run, as train.py names it at its end")
    try:
        return read_run(folder.absolute())
    except Unreadable as reason:
        raise UserError(f"{folder} is no run that can be compared: {reason}; give the folder of another") from None


def compare(a: Run, b: Run) -> dict[str, Any]:
    """Plain values, with None for what is not known and the reason beside it."""
    first, second = entry(a, most=2), entry(b, most=2)
    devices, prices = _devices(a, b), _prices(a, b)
    figures = [
        {"name": name, **_pair(first["figures"][name], second["figures"][name]), "note": _beside(name, devices, prices)}
        for name in FIGURES
    ]
    reached = _reached(a, b)
    for name, axis in reached["axes"].items():
        axis["note"] = _beside(name, devices, prices)
    return {
        "a": {"folder": str(a.folder), "status": a.status, "hardware": first["hardware"], "notes": first["notes"]},
        "b": {"folder": str(b.folder), "status": b.status, "hardware": second["hardware"], "notes": second["notes"]},
        "settings": _differences(a.settings, b.settings),
        "figures": figures,
        "reached": reached,
        "notes": [note for note in (devices, prices, _corpora(a, b)) if note],
    }


def _pair(a: Number | None, b: Number | None) -> dict[str, Number | None]:
    return {"a": a, "b": b, "ratio": None if a is None or b is None or a == 0 else b / a}


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """`only_in` tells a setting that one run does not have from one that is null there."""
    keys = [key for key in [*a, *(key for key in b if key not in a)] if key not in ALWAYS_DIFFERENT]
    return [
        {
            "key": key,
            "a": a.get(key),
            "b": b.get(key),
            "only_in": "a" if key not in b else "b" if key not in a else None,
        }
        for key in keys
        if (key in a) != (key in b) or a[key] != b[key]
    ]


# ------------------------------------------------------------------------------------------------ what does not compare
def _beside(name: str, devices: str | None, prices: str | None) -> str | None:
    if name in OF_DEVICES:
        return devices
    return (prices or devices) if name in OF_PRICES else None


def _devices(a: Run, b: Run) -> str | None:
    names = ("hardware", "device_name", "num_devices", "num_threads")
    if not a.summary or not b.summary:
        return "a run without a summary does not say its device: seconds and dollars may not compare"
    if any(a.summary.get(name) != b.summary.get(name) for name in names):
        of_each = " and ".join(", ".join(str(run.summary.get(name)) for name in names) for run in (a, b))
        return f"different devices ({of_each}): seconds and dollars do not compare"
    return None


def _prices(a: Run, b: Run) -> str | None:
    names = ("price_usd_per_hour", "cost_basis", "usd_per_kwh")
    if a.summary and b.summary and any(a.summary.get(name) != b.summary.get(name) for name in names):
        of_each = " and ".join(
            f"{run.summary.get('price_usd_per_hour')} ({run.summary.get('cost_basis')})" for run in (a, b)
        )
        return f"different prices an hour, {of_each}: dollars do not compare"
    return None


def _corpora(a: Run, b: Run) -> str | None:
    one, other = (run.summary.get("corpus_fingerprint") for run in (a, b))
    if one is not None and other is not None and one != other:
        return (
            "different text or tokenizer: losses a token do not compare, bits per byte only where the text is the same"
        )
    return None


# ----------------------------------------------------------------------------------------- cost of getting equally far
def _reached(a: Run, b: Run) -> dict[str, Any]:
    """Where both curves stand at the value at which the worse one ends."""
    measure = _measure(a, b)
    if measure is None:
        unknown = _corpora(a, b) or "one of the runs has too few logged losses"
        axes: dict[str, Any] = {name: {**_pair(None, None), "reason": unknown} for name in REACHED_OVER}
        return {"measure": None, "target": None, "worse": None, "axes": axes}
    of_run = {"a": _logged(a, measure), "b": _logged(b, measure)}
    finals = {which: decreasing_fit([float(row[measure]) for row in rows])[-1] for which, rows in of_run.items()}
    worse, better = ("a", "b") if finals["a"] > finals["b"] else ("b", "a")
    target = finals[worse]
    axes = {}
    for name in REACHED_OVER:
        pair, why_not = {}, {}
        for which in (worse, better):
            pair[which], why_not[which] = _cost_of(of_run[which], measure, AXES[name], target)
        of = " and ".join(sorted(which.upper() for which, why in why_not.items() if why == _NOT_LOGGED))
        reason = f"{_MISSING[name]} ({of})" if of else why_not[better] or why_not[worse]
        axes[name] = {**_pair(pair["a"], pair["b"]), "reason": reason}
    return {"measure": measure, "target": target, "worse": worse, "axes": axes}


def _measure(a: Run, b: Run) -> str | None:
    """Bits per byte where they are often enough evaluated, else the training loss if it is of the same tokens."""
    if all(len(_logged(run, "val/bits_per_byte")) >= MIN_EVALUATIONS for run in (a, b)):
        return "val/bits_per_byte"
    enough = all(len(_logged(run, "train/loss")) >= 2 for run in (a, b))
    return "train/loss" if enough and _corpora(a, b) is None else None


def _logged(run: Run, metric: str) -> list[Row]:
    return [row for row in run.rows if value(row, metric) is not None]


_NOT_LOGGED = "not logged"


def _cost_of(rows: Sequence[Row], measure: str, axis: str, target: float) -> tuple[float | None, str | None]:
    """Where on the axis the run's fit reaches the target, by interpolation between logged points; or why nowhere."""
    spent = [value(row, axis) for row in rows]
    fitted = decreasing_fit([float(row[measure]) for row in rows])
    after = next((index for index, loss in enumerate(fitted) if loss <= target), None)
    if after is None:
        return None, "not reached: but for noise in its last points this run ends above it"
    if after == 0:
        return None, "reached before its first logged point"
    before_x, after_x = spent[after - 1], spent[after]
    if before_x is None or after_x is None:
        return None, _NOT_LOGGED
    before, now = fitted[after - 1], fitted[after]
    return before_x + (before - target) / (before - now) * (after_x - before_x), None


def decreasing_fit(values: Sequence[float]) -> list[float]:
    """The never-increasing sequence nearest to `values` in squares: stretches that rise are replaced by their mean.

    Pool adjacent violators (Barlow et al., 1972), linear in their number.
    """
    blocks: list[tuple[float, int]] = []  # mean, length
    for each in values:
        mean, length = each, 1
        while blocks and blocks[-1][0] <= mean:
            earlier, count = blocks.pop()
            mean, length = (earlier * count + mean * length) / (count + length), count + length
        blocks.append((mean, length))
    return [mean for mean, length in blocks for _ in range(length)]
