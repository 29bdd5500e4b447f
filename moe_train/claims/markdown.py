"""The report as Markdown, and the README's section: both say what the JSON says and no more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_train.errors import UserError

Content = dict[str, Any]

BEGIN, END = "<!-- claims: written by scripts/reproduce.py readme=README.md -->", "<!-- /claims -->"
DIFFERENCE, RELATIVE = "nats a token", "log ratio"
_SMOKE = "`scale=smoke` shows that a protocol runs, and proves nothing."


def report(content: Content) -> str:
    """The table of all claims, then each of them with what it rests on."""
    lines = [
        "# Claims put to the test",
        "",
        f"{content['date']}. {content['distinct_runs']} runs, {dollars(content['usd_of_distinct_runs'])} in all. "
        "`supported` and `refuted` are each wrong in at most 5% of suites (Holm over a claim's comparisons); "
        "intervals are of the two one-sided tests. Links lead to the runs.",
        "",
        *table(content["claims"]),
    ]
    if any(claim["scale"] == "smoke" for claim in content["claims"]):
        lines += ["", _SMOKE]
    for scale in dict.fromkeys(claim["scale"] for claim in content["claims"] if claim["verdict"] == "supported"):
        family = [claim for claim in content["claims"] if claim["scale"] == scale]
        still = [claim["claim"] for claim in family if _p(claim) <= 0.05]
        names = ", ".join(still) or "none"
        lines += ["", f"At scale={scale} supported also when adjusted over all {len(family)} claims (Holm): {names}."]
    for claim in content["claims"]:
        lines += ["", *_section(claim)]
    return "\n".join(lines) + "\n"


def _p(claim: dict[str, Any]) -> float:
    p: float | None = claim["p_supported_over_all_claims"]
    return 1.0 if p is None else p


def readme_section(content: Content, link: str) -> str:
    """Between the README's markers. `link`: the report's JSON, as seen from there."""
    devices = dict.fromkeys(_device(claim["device"]) for claim in content["claims"] if claim["device"])
    lines = [
        f"**Claims put to the test** on {'; '.join(devices) or 'no device'}, {content['date']} ([figures]({link})): "
        f"{content['distinct_runs']} runs, {dollars(content['usd_of_distinct_runs'])}.",
        "",
        *table(content["claims"]),
    ]
    if any(claim["scale"] == "smoke" for claim in content["claims"]):
        lines += ["", _SMOKE]
    return "\n".join(lines) + "\n"


def write_readme(readme: Path, content: Content, link: str) -> None:
    """Replace what stands between the markers. Raises UserError where they are missing."""
    try:
        text = readme.read_text()
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
    except OSError as error:
        raise UserError(f"readme={readme} cannot be read ({error.strerror}): give the path of one") from None
    except ValueError:
        raise UserError(f"readme={readme} has no place for it: write the lines {BEGIN} and {END} into it") from None
    readme.write_text(f"{before}{BEGIN}\n{readme_section(content, link)}{END}{after}")


def table(claims: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| claim | scale | verdict | effect | interval | published | runs | dollars |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for claim in claims:
        cells = [
            f"{claim['number']}. {claim['claim']}" if claim["number"] else claim["claim"],
            claim["scale"],
            f"**{claim['verdict']}**",
            effect(claim),
            interval(claim),
            claim["published"],
            _runs_of(claim),
            dollars(claim["usd"]),
        ]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return lines


def _runs_of(claim: dict[str, Any]) -> str:
    made, planned = claim["runs"], claim["planned_runs"]
    return f"{made} of {planned}" if made < planned else str(made)


def effect(figure: dict[str, Any]) -> str:
    if figure["effect"] is None:
        return "–"
    bound = f"{figure['bound']} " if figure["bound"] else ""
    unit = "" if figure["unit"] == RELATIVE else f" {figure['unit']}"
    return f"{bound}{number(figure['effect'], figure['unit'])}{unit}"


def interval(figure: dict[str, Any]) -> str:
    if figure["interval"] is None:
        return "–"
    low, high = (None if end is None else number(end, figure["unit"]) for end in figure["interval"])
    return f"over {low}" if high is None else f"{low} to {high}"


def number(value: float, unit: str) -> str:
    """Differences of losses with their sign, relative ones in percent."""
    if unit == RELATIVE:
        return f"{100 * value:+.3g}%"
    return f"{value:+.3g}" if unit == DIFFERENCE else f"{value:.3g}"


def dollars(usd: float | None) -> str:
    return "no price" if usd is None else f"${usd:.2g}" if usd < 1 else f"${usd:,.2f}"


def _device(device: dict[str, Any]) -> str:
    cores = f", {device['num_threads']} threads" if device["hardware"] == "cpu" else ""
    return f"{device['device_name']}{cores}, {device['compute_dtype']}"


# ------------------------------------------------------------------------------------------------------ one claim


def _section(claim: dict[str, Any]) -> list[str]:
    heading = f"{claim['number']}. " if claim["number"] else ""
    lines = [
        f"## {heading}{claim['claim']} ({claim['scale']}): {claim['verdict']}",
        "",
        claim["statement"],
        "",
        f"Published: {claim['published']} ({claim['source']}).",
        f"Fixed on {claim['registered']}, before the first run ([protocol]({claim['protocol']})): "
        f"{claim['seeds']} seeds, "
        f"{', '.join(f'{tokens:,}' for tokens in claim['budgets'])} tokens.",
        f"Carries over: {claim['carries_over']}",
        f"Does not: {claim['does_not_carry_over']}",
        *_list("Not looked at", claim["reasons"]),
        *_list("Notes", claim["notes"]),
        "",
        *_comparisons(claim["comparisons"]),
        *_axes(claim["axes"]),
        *_runs(claim),
    ]
    return lines


def _list(title: str, items: Sequence[str]) -> list[str]:
    return ["", f"{title}:", "", *(f"- {item}" for item in items)] if items else []


def _comparisons(comparisons: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| comparison | verdict | effect | interval | p for | p against | p of a difference | between seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in comparisons:
        values = [each["p_supported"], each["p_refuted"], each["p_difference"], each["sigma"]]
        shown = ["–" if value is None else f"{value:.2g}" for value in values]
        name = each["statement"] + ("" if each["decides"] else " (does not decide)")
        lines.append(f"| {name} | {each['verdict']} | {effect(each)} | {interval(each)} | {' | '.join(shown)} |")
    said = [f"- {each['name']}: {each['power']}" for each in comparisons if each["power"]]
    said += [f"- {each['name']}: not computed, {each['reason']}" for each in comparisons if each["reason"]]
    return [*lines, *(["", *said] if said else [])]


def _axes(axes: Sequence[dict[str, Any]]) -> list[str]:
    if not axes:
        return []
    lines = [
        "",
        "What the other arm takes, as a multiple of what the arm takes (training steps alone):",
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
        f"Runs on {_device(device)}, {paid}; {device['corpus']}, torch {device['versions']['torch']}. "
        f"{dollars(claim['usd'])}, of which {dollars(claim['usd_tuning'])} for learning rates. Rates: "
        + ", ".join(f"{arm} {rate:.4g}" for arm, rate in claim["learning_rates"].items())
        + ".",
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
