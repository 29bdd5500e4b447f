"""From hydra's composition to one frozen `RunConfig`, and from every mistake on the way to one line.

pydantic reports mistakes in its own, many-line manner; what a user needs is the key, the value and the remedy. Unknown
keys come with the nearest one that exists. What hydra says is put into words by hydra_errors.py.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from moe_train.config import ModelConfig, OptimizerConfig, PrecisionConfig, RunConfig
from moe_train.config.fields import STRICT, Size
from moe_train.errors import UsageError, UserError, one_line
from moe_train.hydra_errors import CONFIGS as CONFIGS  # which everybody takes from here
from moe_train.hydra_errors import explain_hydra_error

T = TypeVar("T")


def to_run_config(composed: DictConfig) -> RunConfig:
    """The checked configuration of one run. Raises UserError naming the first key that is wrong."""
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"configuration: {one_line(error)}") from None
    return validated(RunConfig, plain, "configuration")


PUBLISHED_LENGTH = 4096  # tokens a sequence, at which most published models were trained


@dataclass(frozen=True, config=STRICT)
class ComposedModel:
    """A model without a run, and what of a run's settings decides its cost."""

    model: ModelConfig
    optimizer: OptimizerConfig
    precision: PrecisionConfig
    default_vocab_size: Size  # of the tokenizer that a run would train
    default_sequence_length: Size  # of a run

    @property
    def sequence_length(self) -> int:
        """A run's, or that of training for a published architecture, which brings its own vocabulary."""
        return self.default_sequence_length if self.model.vocab_size is None else PUBLISHED_LENGTH


_OF_A_MODEL = ("model", "optimizer", "precision")  # the groups of configs/train.yaml it is made of


def split_overrides(
    arguments: list[str], keys: tuple[str, ...] = _OF_A_MODEL
) -> tuple[list[str], Path | None, list[str]]:
    """What of a script's arguments is meant for hydra: overrides of `keys`, --config-dir's folder; and the others."""
    overrides, others = [], []
    folder: Path | None = None
    rest = iter(arguments)
    for argument in rest:
        key = argument.partition("=")[0]
        if key == "--config-dir":
            value = argument.partition("=")[2] or next(rest, "")
            if not value:
                raise UsageError("--config-dir needs a folder: --config-dir DIR with DIR/model/NAME.yaml in it")
            folder = Path(value)
        elif re.split(r"[./]", key.lstrip("+~"))[0] in keys:
            overrides.append(argument)
        else:
            others.append(argument)
    return overrides, folder, others


def compose_model(overrides: list[str], config_dir: Path | None = None) -> ComposedModel:
    """The model and optimizer of `python train.py OVERRIDES…`; `config_dir` holds further `model/NAME.yaml`.

    Raises UserError naming what is wrong.
    """
    if not any(override.startswith("model=") for override in overrides):
        names = ", ".join(sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml")))
        raise UsageError(f"model= is missing: choose one of {names}")
    search = _search_path(config_dir)
    try:
        with _hydra():
            composed = compose("train", overrides=[*search, *overrides])
        plain = {group: OmegaConf.to_container(composed[group], resolve=True) for group in _OF_A_MODEL}
        plain["default_vocab_size"] = composed.data.vocab_size
        plain["default_sequence_length"] = composed.data.sequence_length
    except Exception as error:  # hydra raises errors of its own, of omegaconf, of its parsers and plain ValueErrors
        raise explain_hydra_error(error, config_dir) from None
    return validated(ComposedModel, plain, "configuration")


def compose_run(overrides: list[str], name: str, config_dir: Path | None = None) -> RunConfig:
    """The run of `python train.py name=NAME OVERRIDES…`, composed in this process. Raises UserError."""
    return to_run_config(compose_unchecked([f"name={name}", *overrides], config_dir))


@contextlib.contextmanager
def _hydra() -> Iterator[None]:
    """hydra on configs/, also within a command that hydra itself has started: it knows one at a time."""
    started = get_gh_backup()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            yield
    finally:
        restore_gh_from_backup(started)


def _search_path(config_dir: Path | None) -> list[str]:
    """hydra's override that makes it look into a folder of the user's own as well."""
    if config_dir is None:
        return []
    if not config_dir.is_dir():
        raise UserError(f"--config-dir {config_dir}: there is no such folder: give one with model/NAME.yaml in it")
    return [f"hydra.searchpath=[{quoted(f'file://{config_dir.absolute()}')}]"]


def key_of(override: str) -> str:
    """What `key=value`, `+key=value` or `~key` is about."""
    return override.lstrip("+~").partition("=")[0]


def quoted(value: object) -> str:
    """A value as hydra's grammar takes it whatever is in it."""
    text = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def compose_unchecked(overrides: list[str], config_dir: Path | None = None) -> DictConfig:
    """hydra's composition, in which every key and choice exists; whether it makes a run is not said. UserError."""
    search = _search_path(config_dir)
    try:
        with _hydra():
            return compose("train", overrides=[*search, "name=unnamed", *overrides])
    except Exception as error:
        raise explain_hydra_error(error, config_dir) from None


def validated(schema: type[T], values: Any, where: str) -> T:
    """`values` (plain dicts and lists) as `schema`, strictly: no unknown key, no converted type."""
    try:
        # Strict JSON mode: a list is a tuple there, but "3" is still no number.
        return TypeAdapter(schema).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error, values)}") from None


_MISSING = ("missing", "missing_argument")


def _explain(error: ValidationError, values: Any) -> str:
    """The first mistake, unknown keys before others: a misspelt key also makes the right one missing."""
    mistakes = error.errors(include_url=False)
    first = next((m for m in mistakes if m["type"] in ("unexpected_keyword_argument", "extra_forbidden")), mistakes[0])
    path = _key_path(first["loc"], values)
    key = ".".join(path)
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        kind = _kind_beside(path, values)
        if kind is not None and path[-2:-1] == ["attention"]:
            return f"unknown key {key} with kind={kind}: in a file that starts from another, `override attention: NAME`"
        missing = [m["loc"][-1] for m in mistakes if m["type"] in _MISSING]
        return f"unknown key {key}{_suggestion(path[-1], missing + _siblings(path, values))}"
    if first["type"] in _MISSING:
        keys = [".".join(_key_path(m["loc"], values)) for m in mistakes if m["type"] in _MISSING]
        return f"{key} is missing: give {key}=…" if len(keys) == 1 else f"missing: {', '.join(keys)}: give each a value"
    if first["type"] == "value_error":
        return f"{key}: {reason}" if key else reason
    return f"{key}={json.dumps(first['input'])}: {reason[0].lower()}{reason[1:]}"


def _key_path(location: tuple[int | str, ...], values: Any) -> list[str]:
    """pydantic's location without the names of union members, which no user typed."""
    path: list[str] = []
    node = values
    at_union = True
    for part in location:
        if isinstance(node, dict) and part is not location[-1]:
            of_union = part not in node or (at_union and node.get("kind") == part)
            at_union = not of_union  # the name of a member comes once
            if of_union:
                continue
        path.append(str(part))
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int):
            node = node[part] if part < len(node) else None
    return path


def _kind_beside(path: list[str], values: Any) -> str | None:
    """What `kind` says beside the key, where the key is one of a group with several kinds."""
    node = values
    for part in path[:-1]:
        node = node.get(part, {}) if isinstance(node, dict) else {}
    return node.get("kind") if isinstance(node, dict) else None


def _siblings(path: list[str], values: Any) -> list[str]:
    node = values
    for part in path[:-1]:
        node = node.get(part, {}) if isinstance(node, dict) else {}
    return [str(key) for key in node if key != path[-1]] if isinstance(node, dict) else []


def _suggestion(key: str, candidates: list[Any]) -> str:
    near = difflib.get_close_matches(key, [str(c) for c in candidates], n=1, cutoff=0.5)
    return f": did you mean {near[0]}?" if near else ": see configs/ for the keys there are"
