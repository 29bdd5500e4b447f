"""The report as Markdown, and the README's section: both say what the JSON says and no more."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_train.claims.section import section
from moe_train.claims.statistics import holm
from moe_train.claims.words import deciding, device_of, dollars, effect, interval, seeds_made_again, word
from moe_train.cli import write_whole
from moe_train.errors import UserError

Content = dict[str, Any]

BEGIN, END = "<!-- claims: written by scripts/reproduce.py readme=README.md -->", "<!-- /claims -->"
_HEAD = ("claim", "scale", "verdict", "what decides: effect (interval)", "published", "runs", "dollars")
_SMOKE = "`scale=smoke` shows that a protocol runs, and proves nothing."


def report(content: Content) -> str:
    """The table of all claims, then each of them with what it rests on."""
    lines = [
        "# Claims put to the test",
        "",
        f"{content['date']}. {content['distinct_runs']} runs, {dollars(content['usd_of_distinct_runs'])} in all. "
        "A claim is supported where every comparison that decides is, and refuted where one is; each of the two words "
        "is wrong in at most 5% of suites. To that end `p for` and `p against` are adjusted over a claim's comparisons "
        "(Holm); intervals, of 90% unless said otherwise, are each comparison's own. Tests are t tests, paired by seed "
        "unless said otherwise, and a bootstrap over seeds for what a loss costs. Links lead to the runs.",
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
        lines += ["", *section(claim)]
    return "\n".join(lines) + "\n"


def _p(claim: dict[str, Any]) -> float:
    p: float | None = claim["p_supported_over_all_claims"]
    return 1.0 if p is None else p


def readme_section(contents: Mapping[str, Content]) -> str:
    """Between the README's markers: the claims of all reports in one table. `contents`: reports by the link to each.

    A claim has a row for each scale, of the suite that was made last; what earlier ones said stands at its end.
    """
    runs = sum(content["distinct_runs"] for content in contents.values())
    spent = [content["usd_of_distinct_runs"] for content in contents.values()]
    usd = None if None in spent else sum(spent)
    suites = _suites(contents)
    latest = [made[-1][0] for (_, scale), made in suites.items() if scale != "smoke"]
    adjusted = holm([1.0 if claim["p_supported"] is None else claim["p_supported"] for claim in latest])
    supported = [claim for claim, p in zip(latest, adjusted) if claim["verdict"] == "supported" and p <= 0.05]
    still = [f"{claim['claim']} ({claim['scale']})" for claim in supported]
    lines = [
        f"**Claims put to the test**: {runs:,} runs that finished, {dollars(usd)}, those of earlier suites "
        "(said before) included.",
        "",
        *_table([*_HEAD, "registered", "said before"], [_latest(*made) for made in suites.values()]),
        "",
        f"Intervals are of 90%; of each claim's verdicts at most 5% are wrong. Adjusted over the latest suites of all "
        f"{len(latest)} (Holm), supported: {', '.join(still) or 'none'}.",
    ]
    if any(scale == "smoke" for _, scale in suites):
        lines += ["", _SMOKE]
    return "\n".join(lines) + "\n"


def _registered(claim: dict[str, Any], date: str) -> str:
    """When its protocol was written down: a moment, and in its digest, where the report's date is that of all of it."""
    moment: str = claim.get("registered") or date
    return moment


_Suite = tuple[Content, str, str]  # a claim as a report has it, the report's date, the link to it


def _suites(contents: Mapping[str, Content]) -> dict[tuple[str, str], list[_Suite]]:
    """Of each claim and scale, the first that was made first, whatever the order that reports are named in."""
    made = [(claim, content["date"], link) for link, content in contents.items() for claim in content["claims"]]
    made.sort(key=lambda each: (_registered(*each[:2]), each[2]))
    made.sort(key=lambda each: (each[0]["number"] or float("inf"), each[0]["claim"], each[0]["scale"]))
    suites: dict[tuple[str, str], list[_Suite]] = {}
    for each in made:
        suites.setdefault((each[0]["claim"], each[0]["scale"]), []).append(each)
    return suites


def _latest(*made: _Suite) -> list[str]:
    """The row of the last of them, and behind it a word and a figure from each of the others."""
    *earlier, (claim, date, link) = made
    said = [
        f"[{each['verdict']}]({where}), {'; '.join(effect(e) for e in deciding(each))}" for each, _, where in earlier
    ]
    return [*_row(claim), _made(claim, date, link), "<br>".join(said)]


def _made(claim: dict[str, Any], date: str, link: str) -> str:
    return f"[{_registered(claim, date)[:10]}]({link})" + (f", {device_of(claim['device'])}" if claim["device"] else "")


def write_readme(readme: Path, contents: Mapping[str, Content]) -> None:
    """Replace what stands between the markers. `contents`: of reports, by link. Raises UserError where it cannot."""
    try:
        with readme.open(newline="", encoding="utf-8") as file:  # as its lines end
            text = file.read()
        before, rest = text.split(BEGIN)
        earlier, after = rest.split(END)
    except OSError as error:
        raise UserError(f"readme={readme} cannot be read ({error.strerror}): give the path of one") from None
    except UnicodeDecodeError:
        raise UserError(f"readme={readme} is no text in UTF-8: convert it first") from None
    except ValueError:
        raise UserError(
            f"readme={readme} has no place for it, or several: write the lines {BEGIN} and {END} into it, once"
        ) from None
    made = f"{BEGIN}\n{readme_section(contents)}{END}"
    if "\r\n" in before + after:
        made = made.replace("\n", "\r\n")
    try:
        write_whole(readme.resolve(), f"{before}{made}{after}")  # where a link leads
    except OSError as error:
        raise UserError(f"readme={readme} cannot be written ({error.strerror}): it is as it was") from None
    gone = [link for link in dict.fromkeys(re.findall(r"\]\(([^)]+\.json)\)", earlier)) if link not in contents]
    if gone:
        sys.stderr.write(f"note: no longer in {readme}, as report= did not name them: {', '.join(gone)}\n")


def table(claims: Sequence[dict[str, Any]]) -> list[str]:
    return _table(_HEAD, [_row(claim) for claim in claims])


def _row(claim: dict[str, Any]) -> list[str]:
    return [
        (f"{claim['number']}. " if claim["number"] else "") + claim["claim"] + seeds_made_again(claim, "seeds "),
        claim["scale"],
        f"**{claim['verdict']}**",
        "; ".join(_found(each, alone=len(deciding(claim)) == 1, scale=claim["scale"]) for each in deciding(claim)),
        claim["published"],
        _runs_of(claim),
        dollars(claim["usd"]),
    ]


def _found(compared: dict[str, Any], alone: bool, scale: str) -> str:
    """What was asked and what was found; with others beside it, the verdict as well."""
    verdict = "" if alone else f", {word(compared['verdict'], scale)}"
    return f"{compared['statement']}: {effect(compared)} ({interval(compared)}){verdict}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *([_in_a_cell(text) for text in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _in_a_cell(text: str) -> str:
    """On one line, and no mark of ours or of a comment in it."""
    return " ".join(text.replace("|", "/").replace("<!--", "&lt;!--").split())


def _runs_of(claim: dict[str, Any]) -> str:
    made, planned = claim["runs"], claim["planned_runs"]
    return f"{made} of {planned}" if made < planned else str(made)
