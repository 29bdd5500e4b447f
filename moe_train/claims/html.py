"""The report as one page that needs nothing else: the Markdown's tables, and the curves as SVG in it."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from moe_train.claims import figures, markdown

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; display: block; overflow-x: auto; }
td, th { border-bottom: 1px solid #ddd; padding: .25em .7em; text-align: left; vertical-align: top; }
h2 { margin-top: 2.5em; border-top: 2px solid #222; padding-top: .5em; }
svg { max-width: 100%; height: auto; }
a { color: #1d4ed8; } code { background: #f3f4f6; padding: 0 .2em; }
"""


def report(content: dict[str, Any]) -> str:
    """From the report's JSON."""
    pictures = {_heading(claim): figures.svg(claim) for claim in content["claims"]}
    body = _blocks(markdown.report(content).splitlines(), pictures)
    title = "Claims put to the test"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _heading(claim: dict[str, Any]) -> str:
    start = f"{claim['number']}. " if claim["number"] else ""
    return f"{start}{claim['claim']} ({claim['scale']}): {claim['verdict']}"


def _blocks(lines: list[str], pictures: dict[str, str]) -> str:
    """Only what our own Markdown uses: headings, paragraphs, lists, tables."""
    out: list[str] = []
    position = 0
    while position < len(lines):
        line = lines[position]
        block = [line]
        kind = next((start for start in ("|", "- ") if line.startswith(start)), "")
        if kind or (line and not line.startswith("#")):
            while position + 1 < len(lines) and _continues(lines[position + 1], kind):
                position += 1
                block.append(lines[position])
        position += 1
        if line.startswith("#"):
            level, text = line.split(" ", 1)
            out.append(f"<h{len(level)}>{_inline(text)}</h{len(level)}>{pictures.get(text, '')}")
        elif kind == "|":
            out.append(_table(block))
        elif kind:
            out.append("<ul>" + "".join(f"<li>{_inline(item[2:])}</li>" for item in block) + "</ul>")
        elif line:
            out.append(f"<p>{'<br>'.join(map(_inline, block))}</p>")
    return "\n".join(out)


def _continues(line: str, kind: str) -> bool:
    return line.startswith(kind) if kind else bool(line) and not line.startswith(("#", "|", "- "))


def _table(lines: list[str]) -> str:
    rows = [[_inline(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
    head, body = rows[0], rows[2:]
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    return (
        f"<table><tr>{cells}</tr>"
        + "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body)
        + "</table>"
    )


def _inline(text: str) -> str:
    text = escape(text, quote=False)
    text = re.sub(r"\[([^\]]+)\]\(((?:runs|registered)/[\w.-]+)\)", r'<a href="\2">\1</a>', text)  # no links of others
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
