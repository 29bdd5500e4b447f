"""Where figures go as they come: after every suite, so that one that fails or is interrupted costs none before it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from moe_train.benchmark.figures import Figure, doubts
from moe_train.benchmark.results import Content, merged, save
from moe_train.cli import write_json
from moe_train.errors import UserError

AGAIN = "measure again when nothing else is at work"


class Keeper:
    """`json` and `saved` are files, or None where nobody asked for one. Either is whole at any moment."""

    def __init__(self, json: Path | None, saved: Path | None) -> None:
        self._json, self._saved = json, saved
        self._content: Content | None = None  # of all suites so far
        self._kept: dict[Path, list[str]] = {}  # suites, by the file they are in
        self._lacking: list[str] = []  # what was asked for and is not there

    def keep(self, suite: str, content: Content, figures: Sequence[Figure]) -> None:
        """What `suite` measured. Raises UserError where a file cannot be written."""
        self._content = merged(self._content, content)
        if self._json is not None:
            self._write(self._json, self._content)
            self._kept.setdefault(self._json, []).append(suite)
        if all(figure.value is None for figure in figures):
            reason = next((figure.note for figure in figures if figure.note), "no reason is known")
            self._lacking.append(f"suite={suite}: nothing could be measured: {reason}")
        elif self._saved is not None and (doubt := doubts(figures)) is not None:
            self._lacking.append(f"suite={suite} is not kept in {self._saved}: {doubt}; {AGAIN}")
        elif self._saved is not None:
            save(self._saved, content)
            self._kept.setdefault(self._saved, []).append(suite)

    def _write(self, path: Path, content: Content) -> None:
        """The first time as a new file: another command's of the same name stays."""
        new = path not in self._kept
        try:
            if new:
                path.open("x").close()
            write_json(path, content)
        except FileExistsError:
            raise UserError(f"json={path} was made by somebody else meanwhile, and is left: choose another") from None
        except OSError as error:
            if new:
                path.unlink(missing_ok=True)
            raise UserError(f"json={path} cannot be written ({error.strerror}): choose another file") from None

    @property
    def said(self) -> str:
        """Which suites are in which file; empty: none in any."""
        return "; ".join(f"{', '.join(suites)} kept in {path}" for path, suites in self._kept.items())

    def close(self) -> None:
        """Say what is kept. Raises UserError where something is lacking."""
        if self.said:
            sys.stdout.write(f"{self.said}\n")
        if self._lacking:
            raise UserError("; ".join(self._lacking))
