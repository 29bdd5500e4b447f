"""What is checked of the runs before any statistic is looked at: that they are the ones planned, and comparable.

A run is judged by what it did (its summary, its curve), not by what it was told: other text, another number of tokens,
another configuration, a part of the validation text, another format or version show here. Seconds and dollars have
conditions of their own: one device, one price, no neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moe_train.claims import starts
from moe_train.claims.plan import Plan
from moe_train.claims.results import Result
from moe_train.cost.ledger import read_account
from moe_train.errors import UserError

_ALIKE = {
    "corpus_fingerprint": "trained on other text",
    "val_tokens": "evaluated on other text",
    "compute_dtype": "computed in another format",
    "cost_basis": "charged in another way",
}
_VERSIONS = ("moe_train", "torch")
_TIMED_ALIKE = {
    "device_name": "on another device",
    "hardware": "priced as other hardware",
    "num_devices": "on another number of devices",
    "num_threads": "with another number of threads",
    "cpu_kernels": "by other kernels of the CPU",
    "cuda_graphs": "with other launches of kernels",
    "price_usd_per_hour": "at another price",
}


def problems(plan: Plan, results: Sequence[Result], tuning: Sequence[Result] = ()) -> list[str]:
    """Why the runs cannot be compared at all, a line each; none if they can. Rates rest on `tuning`."""
    found = [line for result in [*tuning, *results] for line in _as_planned(result)]
    for key, what in _ALIKE.items():
        found += _odd_ones_out(results, [result.summary.get(key) for result in results], what)
    versions = [{name: result.summary["versions"].get(name) for name in _VERSIONS} for result in results]
    found += _odd_ones_out(results, versions, "made with another version")
    return found + _other_tokens(results)


def not_comparable(results: Sequence[Result]) -> dict[str, str]:
    """Why seconds, or dollars, of the runs cannot be compared: by axis, where it is so."""
    timed = _timing_problems(results)
    if timed:
        return {"seconds": timed[0], "usd": timed[0]}
    if any(not result.summary["usd_train"] for result in results):  # of a price of 0 there is no ratio
        return {"usd": "no price above 0 is known for the device: give hardware.price_usd_per_hour=…"}
    return {}


def _timing_problems(results: Sequence[Result]) -> list[str]:
    found = []
    for key, what in _TIMED_ALIKE.items():
        found += _odd_ones_out(results, [result.summary.get(key) for result in results], what)
    for result in results:
        if others := _earlier_terms(result):
            found.append(f"{result.place}: made in part {others}: remove the folder, and the run is made again")
        if result.neighbours:
            found.append(
                f"{result.place}: timed beside {result.neighbours} other jobs on its device: make it with jobs=1"
            )
    return found


def _earlier_terms(result: Result) -> str | None:
    """Under which other terms a part of a run's steps was made that went on, by what each attempt was billed."""
    if result.summary.get("earlier_hardware"):  # older runs' have none
        return f"on {', '.join(result.summary['earlier_hardware'])}"
    attempts = [each for each in read_account(result.folder / "ledger.json") if each.train_seconds]
    for each in attempts[:-1]:
        for key, what in (("num_threads", "with {} threads"), ("price_usd_per_hour", "at ${:g} an hour")):
            before, last = getattr(each, key), getattr(attempts[-1], key)
            if before is not None and last is not None and before != last:
                return what.format(before)
    return None


def _as_planned(result: Result) -> list[str]:
    run, summary, where = result.run, result.summary, result.place
    found = []
    from moe_train.training.run_folder import load_run_config  # brings torch along

    # The folder's own configuration, hashed anew: neither a summary nor a folder's name is taken at its word.
    try:
        actual = load_run_config(result.folder).config_hash()
    except UserError as error:
        return [
            f"{where}: the configuration of arm {run.arm} is not there to be checked ({error}): remove the folder, and "
            "the run is made again"
        ]
    if not run.hash == actual == summary["config_hash"]:
        found.append(f"{where}: arm {run.arm} was trained with another configuration ({actual}, not {run.hash})")
    step = run.config.batch_size * run.config.data.sequence_length
    if not run.tokens <= summary["tokens"] < run.tokens + step:
        found.append(f"{where}: arm {run.arm} trained on {summary['tokens']:,} tokens, not {run.tokens:,}")
    if summary["seed"] != run.seed:
        found.append(f"{where}: arm {run.arm} has seed {summary['seed']}, not {run.seed}")
    if summary["val_loss"] is None or not summary["val_complete"]:
        found.append(f"{where}: arm {run.arm} was not evaluated to the end")
    curve = [row["val/loss"] for row in result.rows if row.get("val/loss") is not None][-1:]
    if curve and not math.isclose(curve[0], summary["val_loss"] or 0.0, rel_tol=1e-4):  # evaluated twice after a kill
        found.append(
            f"{where}: arm {run.arm} ended at {curve[0]:.6g} by its curve and at {summary['val_loss']} by its summary"
        )
    if not (result.folder / "ledger.json").exists():
        found.append(f"{where}: what arm {run.arm} cost is not known, as its ledger.json is not there")
    started = starts.problem(result)
    found += [started] if started else []
    return [f"{line}: remove the folder, and the run is made again" for line in found]


def _odd_ones_out(results: Sequence[Result], values: Sequence[Any], what: str) -> list[str]:
    """Those whose value is not the commonest one."""
    if not results:
        return []
    common = max(values, key=list(values).count)
    return [
        f"{result.place}: arm {result.run.arm}, seed {result.run.seed}, was {what} ({value}, the others {common})"
        for result, value in zip(results, values)
        if value != common
    ]


def _other_tokens(results: Sequence[Result]) -> list[str]:
    """Runs of one seed have seen as many tokens by the same step, whatever their arm; which, follows from both."""
    found = []
    seen: dict[tuple[int, int], tuple[float, Result]] = {}
    for result in results:
        for row in result.rows:
            tokens, key = row.get("progress/tokens"), (result.run.seed, int(row["step"]))
            if tokens is None or row["step"] == result.summary["steps"]:
                continue
            first, other = seen.setdefault(key, (tokens, result))
            if first != tokens and other.run.arm != result.run.arm:
                found.append(
                    f"{result.place}: arm {result.run.arm} had seen {tokens:,.0f} tokens at step {row['step']}, arm "
                    f"{other.run.arm} {first:,.0f}: their data are not in the same order"
                )
                break
    return found
