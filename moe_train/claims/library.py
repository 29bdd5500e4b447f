"""Claim files: the project's in configs/claim/, a user's in DIR/claim/ with --config-dir DIR."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from moe_train.compose import CONFIGS, validated
from moe_train.config.claim import ClaimConfig, ScaleName
from moe_train.errors import UserError, one_line


@dataclass(frozen=True)
class Claim:
    name: str
    file: Path
    config: ClaimConfig


def load_claims(names: str, scale: ScaleName, config_dir: Path | None) -> list[Claim]:
    """`NAME`, several with commas, or `all` that have this scale, the numbered ones first. Raises UserError."""
    files = _files(config_dir)
    if names == "all":
        claims = [_load(file) for file in files.values()]
        return sorted(
            (claim for claim in claims if scale in claim.config.scales),
            key=lambda claim: (claim.config.number or 10**6, claim.name),
        )
    claims = []
    for name in dict.fromkeys(part.strip() for part in names.split(",")):
        if name not in files:
            near = difflib.get_close_matches(name, files, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(files)}, or all"
            raise UserError(
                f"there is no claim={name}: {hint} (one of your own: DIR/claim/NAME.yaml, --config-dir DIR)"
            )
        claim = _load(files[name])
        if scale not in claim.config.scales:
            raise UserError(
                f"claim={name} has no scale={scale}: choose from {', '.join(claim.config.scales)}, or add it to "
                f"{claim.file}"
            )
        claims.append(claim)
    return claims


def _files(config_dir: Path | None) -> dict[str, Path]:
    """By name; a user's file wins over one here."""
    if config_dir is not None and not config_dir.is_dir():
        raise UserError(f"--config-dir {config_dir}: there is no such folder: give one with claim/NAME.yaml in it")
    folders = [CONFIGS] if config_dir is None else [CONFIGS, config_dir]
    return {file.stem: file for folder in folders for file in sorted((folder / "claim").glob("*.yaml"))}


def _load(file: Path) -> Claim:
    if not re.fullmatch(r"[\w-]+", file.stem):
        raise UserError(f"{file}: a claim is called by its file's name: use letters, digits, _ and -")
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no YAML ({one_line(error)}): correct the file") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): correct that or choose another claim") from None
    return Claim(file.stem, file, validated(ClaimConfig, content, str(file)))
