"""Claim files: the project's in configs/claim/, a user's in DIR/claim/ with --config-dir DIR."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_train.config.claim import ClaimConfig, ScaleName
from moe_train.errors import UserError
from moe_train.named_files import file_named, load_named, named_files


@dataclass(frozen=True)
class Claim:
    name: str
    file: Path
    config: ClaimConfig


def load_claims(names: str, scale: ScaleName, config_dir: Path | None) -> list[Claim]:
    """`NAME`, several with commas, or `all` that have this scale, the numbered ones first. Raises UserError."""
    files = named_files("claim", config_dir)
    if names == "all":
        claims = [_load(file) for file in files.values()]
        return sorted(
            (claim for claim in claims if scale in claim.config.scales),
            key=lambda claim: (claim.config.number or 10**6, claim.name),
        )
    claims = []
    for name in dict.fromkeys(part.strip() for part in names.split(",")):
        claim = _load(file_named("claim", name, files, ", or all"))
        if scale not in claim.config.scales:
            raise UserError(
                f"claim={name} has no scale={scale}: choose from {', '.join(claim.config.scales)}, or add it to "
                f"{claim.file}"
            )
        claims.append(claim)
    return claims


def _load(file: Path) -> Claim:
    return Claim(file.stem, file, load_named("claim", file, ClaimConfig))
