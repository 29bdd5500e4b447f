"""The page: template, style, scripts, plotly and the data in one file that needs nothing else, no network least of all.

Data goes in as JSON that no browser takes for markup, and its scripts put names on the page as text only. A content
security policy forbids the page to load or send anything, whatever a library may come to try.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from moe_train.errors import UserError

MARKER = "<!-- written by scripts/dashboard.py of moe_train: may be written again -->"
_HERE = Path(__file__).parent
_SCRIPTS = ("format.js", "charts.js", "table.js", "page.js")
_HEAD_BYTES = 400  # in which the marker stands


def as_json(content: dict[str, Any]) -> str:
    """JSON that can stand in a script element: no `<` or `>` of it ends the element or opens a comment."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.encode("utf-8", "replace").decode()  # half a character, as the name of a file may have
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def as_page(content: dict[str, Any], refresh_seconds: float = 0.0) -> str:
    """`refresh_seconds` is how often a served page asks for new data; 0 for one in a file."""
    return _shell(refresh_seconds).replace("{{data}}", as_json(content), 1)


@cache
def _shell(refresh_seconds: float) -> str:
    """All but the data. Its place is before plotly, so that nothing in there can be taken for it."""
    parts = {
        "marker": MARKER,
        "refresh": f"{refresh_seconds:g}",
        "style": (_HERE / "page.css").read_text(encoding="utf-8"),
        "scripts": "\n".join((_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS),
        "plotly": get_plotlyjs(),
    }
    before, data, after = (_HERE / "page.html").read_text(encoding="utf-8").partition("{{data}}")
    for name, text in parts.items():
        before, after = before.replace(f"{{{{{name}}}}}", text, 1), after.replace(f"{{{{{name}}}}}", text, 1)
    return before + data + after


def check_target(path: Path) -> None:
    """Raises UserError where writing the page would destroy what is not one, or cannot be done."""
    if path.is_dir():
        raise UserError(f"out={path} is a folder: give the name of a file in it, such as {path / 'dashboard.html'}")
    if path.exists():
        try:
            with path.open("rb") as file:
                ours = MARKER.encode() in file.read(_HEAD_BYTES)
        except OSError as error:
            raise UserError(f"out={path} cannot be read ({error.strerror}): choose another file") from None
        if not ours:
            raise UserError(f"out={path} exists already and is no dashboard: choose another file or remove it")


def write_page(path: Path, content: dict[str, Any]) -> int:
    """Writes the page whole or not at all, in place of an earlier one; returns its bytes. Raises UserError."""
    check_target(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(as_page(content), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"out={path} cannot be written ({error.strerror}): choose another file") from None
    return path.stat().st_size
