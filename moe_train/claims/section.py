"""One claim as it stands in the report: what was claimed, what came out and why, and what that rests on.

From the report's JSON alone. An entry that an earlier version wrote may lack what this one adds: then it is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_train.claims.words import deciding, device_of, dollars, effect, interval, seeds_made_again, word


def section(claim: dict[str, Any]) -> list[str]:
    heading = f"{claim['number']}. " if claim["number"] else ""
    return [
        f"## {heading}{claim['claim']} ({claim['scale']}): {claim['verdict']}",
        "",
        f"Claimed: {claim['statement']}",
        f"Published: {claim['published']} ({claim['source']}).",
        f"Verdict: {why(claim)}",
        f"Fixed on {claim['registered']}{_before_its_runs(claim)} ([protocol]({claim['protocol']})): "
        f"{_protocol(claim)}.",
        f"Carries over: {claim['carries_over']}",
        f"Does not: {claim['does_not_carry_over']}",
        *_list("Not looked at", claim["reasons"]),
        *_list("Notes", claim["notes"]),
        "",
        *_comparisons(claim["comparisons"], claim["scale"]),
        *_axes(claim["axes"]),
        *_fits(claim.get("fits", [])),
        *_arms(claim),
        *_runs(claim),
    ]


def why(claim: dict[str, Any]) -> str:
    """The verdict and the comparisons it follows from."""
    verdict, all_of_them = claim["verdict"], deciding(claim)
    if claim["reasons"]:
        return f"{verdict}, since nothing was computed."
    if claim["scale"] == "smoke":
        return f"{verdict}, since nothing is decided at scale=smoke."
    wanted = "refuted" if verdict == "refuted" else "supported"
    named = [each for each in all_of_them if (each["verdict"] == wanted) == (verdict != "inconclusive")]
    said = "; ".join(f"`{each['statement']}` is {each['verdict']}, {effect(each)} ({interval(each)})" for each in named)
    return f"{verdict}, since of {len(all_of_them)} comparison{'s'[: len(all_of_them) > 1]} that decide {said}."


def _before_its_runs(claim: dict[str, Any]) -> str:
    """Where no run began earlier; what is known of others is among the notes."""
    return "" if any(" older than the protocol" in note for note in claim["notes"]) else ", before its first run"


def _protocol(claim: dict[str, Any]) -> str:
    said = [
        f"{claim['seeds']} seeds{seeds_made_again(claim)}",
        f"{' / '.join(f'{tokens:,}' for tokens in claim['budgets'])} tokens",
    ]
    if tuning := claim.get("tuning"):
        factors = ", ".join(f"×{factor:g}" for factor in tuning["factors"])
        seeds = f"{tuning['seeds']} other seeds" if tuning["seeds"] > 1 else "another seed"
        whose = "the arms' common" if tuning.get("together") else "every arm's"
        most = tuning.get("widenings")
        wider = f", and at most {most} rates more beyond an edge at which one is best" if most else ""
        said.append(f"of {whose} rate {factors} the best after {tuning['tokens']:,} tokens with {seeds}{wider}")
    return "; ".join(said)


def _arms(claim: dict[str, Any]) -> list[str]:
    """What each arm is: its settings beside those of all, and its size."""
    lines = [
        "",
        "| arm | settings | parameters | active | FLOPs a token | learning rate |",
        "|---|---|---|---|---|---|",
    ]
    for name, arm in claim["arms"].items():
        more = [f"{key} {arm[key]}" for key in ("starts_from", "flops_of") if arm.get(key)]
        settings = " ".join(f"`{override}`" for override in arm["overrides"])
        rate = claim["learning_rates"].get(name)
        cells = [
            *(name, "; ".join(filter(None, [settings, *more])) or "–"),
            *(f"{arm['total_params']:,.0f}", f"{arm['active_params']:,.0f}", f"{arm['flops_per_token']:.4g}"),
            "–" if rate is None else f"{rate:.4g}",
        ]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    if claim.get("common"):
        lines += ["", "All arms: " + " ".join(f"`{override}`" for override in claim["common"]) + "."]
    return lines


def _fits(fits: Sequence[dict[str, Any]]) -> list[str]:
    """The curves that costs are read off, with what they leave over."""
    if not fits:
        return []
    lines = [
        "",
        "Curves L = E + a·C^−b through the mean losses of each budget, by least squares:",
        "",
        "| arm | losses | E | b | largest residual, nats |",
        "|---|---|---|---|---|",
    ]
    for fit in fits:
        losses = ", ".join(f"{loss:.4f}" for loss in fit["losses"])
        lines.append(
            f"| {fit['arm']} | {losses} | {fit['limit']:.4f} | {fit['exponent']:.3g} | {fit['residual']:.2g} |"
        )
    if any(fit["limit"] < 0 for fit in fits):  # falls nearly straight over the logarithm of its budgets
        lines += ["", "A limit E below zero is no loss: that curve joins the budgets and says nothing beyond them."]
    return lines


def _list(title: str, items: Sequence[str]) -> list[str]:
    return ["", f"{title}:", "", *(f"- {item}" for item in items)] if items else []


def _comparisons(comparisons: Sequence[dict[str, Any]], scale: str) -> list[str]:
    lines = [
        "| comparison | verdict | effect | interval | p for | p against | p of a difference | between seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in comparisons:
        values = [each["p_supported"], each["p_refuted"], each["p_difference"], each["sigma"]]
        shown = ["–" if value is None else f"{value:.2g}" for value in values]
        name = each["statement"] + ("" if each["decides"] else " (does not decide)")
        name += "" if each.get("paired", True) else " (not paired)"
        level = "" if each["level"] in (None, 0.9) else f" ({each['level']:.0%})"
        verdict = word(each["verdict"], scale)
        lines.append(f"| {name} | {verdict} | {effect(each)} | {interval(each)}{level} | {' | '.join(shown)} |")
    said = [f"- {each['name']}: {each['power']}" for each in comparisons if each["power"]]
    said += [f"- {each['name']}: not computed, {each['reason']}" for each in comparisons if each["reason"]]
    return [*lines, *(["", *said] if said else [])]


def _axes(axes: Sequence[dict[str, Any]]) -> list[str]:
    if not axes:
        return []
    lines = [
        "",
        "What the other arm takes, as a multiple of what the arm takes (training steps alone; above 1 the arm saves; "
        "90% intervals):",
        "",
        "| arm | against | at | Δ loss | tokens | FLOPs | seconds | dollars |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in axes:
        cells = [each["arm"], each["against"], each["at"], f"{each['loss_difference']:+.4f}"]
        for axis in ("tokens", "flops", "seconds", "usd"):
            saved = each["axes"][axis]
            cells.append("–" if saved is None else _saved(saved))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _saved(saved: dict[str, Any]) -> str:
    bound = f"{saved['bound']} " if saved["bound"] else ""
    if saved["low"] == saved["high"]:
        return f"{bound}{saved['ratio']:.3g}"
    spread = f"over {saved['low']:.3g}" if saved["high"] is None else f"{saved['low']:.3g} to {saved['high']:.3g}"
    return f"{bound}{saved['ratio']:.3g} ({spread})"


def _runs(claim: dict[str, Any]) -> list[str]:
    device = claim["device"]
    if not device:
        return []
    price = device["price_usd_per_hour"]
    paid = "no price" if price is None else f"${price:g} an hour ({device['price_source']}, {device['price_date']})"
    lines = [
        "",
        f"Runs on {device_of(device)}, {paid}; {device['corpus']}, torch {device['versions']['torch']}. "
        f"{dollars(claim['usd'])}, of which {dollars(claim['usd_tuning'])} for learning rates, with start-up, "
        "evaluation and attempts that failed.",
        "",
        "| run | arm | seed | tokens | rate | validation, nats | bits a byte | seconds | dollars |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in claim["run_list"]:
        purpose = " (tuning)" if run["purpose"] == "tuning" else ""
        usd = "–" if run["usd"] is None else f"{run['usd']:.5f}"
        cells = [
            f"[{run['hash']}]({run['folder']})",
            run["arm"] + purpose,
            str(run["seed"]),
            f"{run['tokens']:,}",
            f"{run['learning_rate']:.4g}",
            f"{run['val_loss']:.4f}",
            f"{run['val_bits_per_byte']:.4f}",
            f"{run['train_seconds']:.1f}",
            usd,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
