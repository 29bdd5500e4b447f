"""What a reader of a verdict has to know besides: how runs were made, what was left out, how far the scale carries."""

from __future__ import annotations

from collections.abc import Sequence

from moe_train.claims import measures, registered
from moe_train.claims.plan import Plan
from moe_train.claims.results import Folder, Result
from moe_train.claims.statistics import binomial_interval
from moe_train.claims.tuning import grid


def notes_on(plan: Plan, results: Sequence[Result], rates: dict[str, float], folder: Folder) -> list[str]:
    """Of a claim whose runs are all there."""
    notes = []
    tuning, factors = plan.scale.tuning, grid(plan, folder)
    if tuning is None:
        notes.append("learning rates are those of the configuration: not tuned at this scale")
    else:
        for name, rate in rates.items():
            factor = rate / plan.arms[name].rate
            if min(abs(factor / edge - 1) for edge in (factors[0], factors[-1])) < 1e-3:
                whose = "all arms" if tuning.together else f"arm {name}"
                notes.append(f"the best learning rate of {whose} is the {rate:.4g} at the edge of its grid")
        notes = list(dict.fromkeys(notes))
    if plan.scale.without:
        all_of_them, here = plan.claim.config.comparisons, plan.claim.config.at(plan.scale_name)
        notes.append(
            f"left out at this scale: arms {', '.join(plan.scale.without)}, and with them "
            f"{len(all_of_them) - len(here)} of {len(all_of_them)} comparisons"
        )
    older = registered.older(plan, folder, results)
    if older:
        runs = "1 of the runs is" if older == 1 else f"{older} of the runs are"
        notes.append(f"{runs} older than the protocol: made for another claim, or before this one was fixed")
    if plan.scale_name == "smoke":
        notes.insert(0, "scale=smoke shows that the protocol runs; it proves nothing, and decides nothing")
    deciding = {arm for c in plan.claim.config.at(plan.scale_name) if c.decides for arm in c.arms}
    ratio = plan.scale.tokens[-1] / max(plan.arms[arm].figures["active_params"] for arm in deciding)
    if ratio < 20 and plan.scale_name != "smoke":
        notes.append(f"{ratio:.2g} tokens an active parameter, fewer than 20: too short for capacity to bind")
    loads = [folder.runs.noted(result.run.hash).get("load_average") for result in results]
    known = [load for load in loads if load is not None]
    if known and next(iter(results)).summary["hardware"] == "cpu":
        notes.append(f"the machine's load average when runs began was {min(known):.1f} to {max(known):.1f}")
    for result in results:
        file = folder.runs.beside(result.run.hash, ".generation.json")
        if file.exists() and result.run.config.model.mtp is not None:
            figures = measures.generation(result, folder, speculative=True)
            if figures.get("drafted"):
                low, high = binomial_interval(figures["accepted"], figures["drafted"], 0.95)
                notes.append(
                    f"arm {result.run.arm}, seed {result.run.seed}: {figures['accepted']} of {figures['drafted']} "
                    f"drafts accepted, {figures['acceptance']:.0%} (95% interval {low:.0%} to {high:.0%}, as if "
                    "drafts of one text did not hang together)"
                )
    return notes
