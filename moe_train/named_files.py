"""YAML files that are chosen by name: the project's in configs/KIND/, a user's in DIR/KIND/ with --config-dir DIR."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml

from moe_train.compose import CONFIGS, validated
from moe_train.errors import UserError, one_line

T = TypeVar("T")


def named_files(kind: str, config_dir: Path | None) -> dict[str, Path]:
    """By name; a user's file wins over one here. Raises UserError where the folder is not there."""
    if config_dir is not None and not config_dir.is_dir():
        raise UserError(f"--config-dir {config_dir}: there is no such folder: give one with {kind}/NAME.yaml in it")
    folders = [CONFIGS] if config_dir is None else [CONFIGS, config_dir]
    return {file.stem: file for folder in folders for file in sorted((folder / kind).glob("*.yaml"))}


def file_named(kind: str, name: str, files: dict[str, Path], others: str = "") -> Path:
    """Raises UserError with the nearest name, or all there are; `others`: what else may be given."""
    if name not in files:
        near = difflib.get_close_matches(name, files, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(files)}{others}"
        raise UserError(f"there is no {kind}={name}: {hint} (one of your own: DIR/{kind}/NAME.yaml, --config-dir DIR)")
    return files[name]


class _EachKeyOnce(yaml.SafeLoader):
    """YAML's loader keeps the last of several values of a key and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(problem=f"{key} is there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def load_named(kind: str, file: Path, schema: type[T]) -> T:
    """The file's content, checked. Raises UserError with the file, the key and the remedy."""
    if not re.fullmatch(r"[\w-]+", file.stem):
        raise UserError(f"{file}: a {kind} is called by its file's name: use letters, digits, _ and -")
    try:
        content = yaml.load(file.read_text(), _EachKeyOnce)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no YAML ({one_line(error)}): correct the file") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): correct that or choose another {kind}") from None
    return validated(schema, content, str(file))
