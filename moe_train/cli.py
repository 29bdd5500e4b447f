"""Entry points: hydra's for training, plain `key=value` for the scripts; both end user errors in one line.

Scripts take free text (a prompt) as a value, which hydra's grammar would want quoted twice, so theirs is simpler: all
that follows the first `=` is the value, taken as the type the script's arguments declare.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from moe_train.errors import UsageError, UserError, in_words, reported
from moe_train.hydra_errors import explain_hydra_error

T = TypeVar("T")


def wants_traceback() -> bool:
    """Asked of the command line, since the configuration itself may be what is wrong."""
    return any(a.startswith("debug=") or a.lower() == "traceback=true" for a in sys.argv[1:])


def hydra_main(main: Callable[[], Any]) -> None:
    """Run a function decorated with hydra.main; its errors and ours become one line and an exit status."""
    # hydra prints its own errors over many lines and exits, unless told to raise them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv[1:] = _flags_first(sys.argv[1:])
    with reported(wants_traceback()):
        try:
            main()
        except Exception as error:
            composing = isinstance(error, (HydraException, OmegaConfBaseException)) or not _from_our_code(error)
            if wants_traceback() or not composing or isinstance(error, UserError):
                raise
            raise explain_hydra_error(error, _config_dir(sys.argv[1:])) from None


@contextlib.contextmanager
def reported_job(traceback: bool) -> Iterator[None]:
    """As `reported`; but in a job of -m under another launcher the error travels back to who submitted it."""
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        with reported(traceback):
            yield
        return
    try:
        yield
    except Exception as error:
        raise UserError(in_words(error)) from error


def check_grid_of_others(budget_usd: float | None) -> None:
    """In a job of `-m` with a launcher that is not ours: what nobody holds over its jobs. Raises UserError."""
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN and budget_usd is not None:
        raise UserError(
            f"budget.usd={budget_usd} is held over all jobs by hydra/launcher=accelerate alone: give each job its "
            "own limit with stop.usd="
        )


def _flags_first(arguments: list[str]) -> list[str]:
    """hydra's own options before the overrides: its parser takes overrides in one piece only."""
    flags, overrides = [], []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        flags.append(argument)
        if argument in ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p"):
            flags += [value for value in [next(rest, None)] if value is not None]
    return flags + overrides


def _config_dir(arguments: list[str]) -> Path | None:
    """The folder of --config-dir, if it was given."""
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            return Path(value if equals else next(rest, ""))
    return None


def _from_our_code(error: BaseException) -> bool:
    """Whether any function of ours but this file's is on the way to the error; hydra's own mistakes have none."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(
        str(f.f_globals.get("__name__", "")).startswith(("moe_train.", "hydra_plugins.accelerate_launcher"))
        and f.f_globals["__name__"] != __name__
        for f, _ in frames
    )


def divide_arguments(schema: type[Any], arguments: list[str]) -> tuple[list[str], list[str]]:
    """A script's own `key=value` arguments, and those meant for somebody else."""
    keys = {field.name for field in dataclasses.fields(schema)}
    own = [a for a in arguments if a.partition("=")[0] in keys or a in ("-h", "--help")]
    return own, [a for a in arguments if a not in own]


def parse_arguments(schema: type[T], arguments: list[str], usage: str, settings: Sequence[str] = ()) -> T:
    """`key=value` arguments as a dataclass of plain types. Raises UsageError naming the argument and the remedy.

    settings: those of train.py that the script takes beside them, for that remedy.
    """
    fields = {field.name: field for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    given: dict[str, str] = {}
    for argument in arguments:
        if argument in ("-h", "--help"):
            sys.stdout.write(usage + "\n")
            sys.exit(0)
        if argument == "debug=traceback":  # read by wants_traceback
            continue
        key, equals, value = argument.partition("=")
        if not equals or key not in fields:
            near = difflib.get_close_matches(key, [*fields, *settings], n=1, cutoff=0.6 if settings else 0.5)
            hint = f"did you mean {near[0]}=?" if near else f"there are {', '.join(f'{name}=' for name in fields)}"
            if settings and not near:
                hint += f", and of train.py's settings {', '.join(settings)}"
            raise UsageError(f"unknown argument {argument}: {hint}")
        given[key] = value
    for name, field in fields.items():
        if name not in given and field.default is dataclasses.MISSING:
            raise UsageError(f"{name}= is missing: {_command(usage, name)} (--help says more)")
    try:
        return TypeAdapter(schema).validate_python(given)
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
        argument = str(mistakes[0]["loc"][0])
        # Where a value may be of several kinds, there is a mistake for each.
        remedies = dict.fromkeys(_remedy(mistake) for mistake in mistakes if mistake["loc"][0] == argument)
        raise UsageError(f"{argument}={mistakes[0]['input']}: {', or '.join(remedies)}") from None


def _command(usage: str, name: str) -> str:
    """How it is called with that argument, of a script's description."""
    commands = [part for part in usage.split("\n\n") if part.startswith("python ") and f"{name}=" in part]
    return commands[0].split("\npython ")[0] if commands else usage


def _remedy(mistake: ErrorDetails) -> str:
    """What to give instead, for pydantic's kinds of mistakes."""
    kind, limits = mistake["type"], mistake.get("ctx", {})
    if kind == "literal_error":
        choices = limits["expected"].replace("'", "").replace(" or ", ", ")
        return f"choose one of {choices}" if "," in choices else f"give {choices}"
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    if kind in bounds:
        words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
        return f"give a number {words[bounds[kind]]} {limits[bounds[kind]]:,}"
    wanted = {
        "int_parsing": "give a whole number",
        "int_from_float": "give a whole number",
        "float_parsing": "give a number",
        "finite_number": "give a finite number",
        "bool_parsing": "choose true or false",
    }
    return wanted.get(kind, mistake["msg"].removeprefix("Value error, "))


def check_json_target(path: Path | None, out: Path | None = None, key: str = "json") -> None:
    """Refuse `json=PATH` before the work is done: where it would overwrite, has no folder, or is `out`.

    `key` is the argument it was given as.
    """
    if path is None:
        return
    if path == Path():
        raise UserError(f"{key}= names no file: give one")
    if out is not None and path.absolute() == out.absolute():
        raise UserError(f"{key}={path} is the folder out={out}: choose a file beside it")
    if path.exists():
        raise UserError(f"{key}={path} exists already: choose another file or remove it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{key}={path}: there is no folder {path.absolute().parent}")
    folder = path.absolute().parent
    try:
        with tempfile.TemporaryFile(dir=folder):  # permissions alone do not tell (root, /proc)
            pass
    except OSError:
        raise UserError(f"{key}={path}: the folder {folder} cannot be written: choose another") from None


def check_plot_target(path: Path | None) -> None:
    """`check_json_target` of a picture, which also needs an ending that can be drawn."""
    check_json_target(path, key="plot")
    if path and path.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"plot={path}: give a file that ends in .svg, .png or .pdf")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """What a script prints, for programs: whole or not at all."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """A file that a kill leaves as it was or as it should be."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
