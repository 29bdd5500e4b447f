"""That all processes of a run are the same run: the same configuration, code and libraries, and the same text.

Processes that differ would train something that no configuration describes, or wait for each other for ever. They are
compared before anything is loaded, and once the text is; what differs is said once, and all end.
"""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_train.config import RunConfig, differences, to_dict
from moe_train.errors import UserError

_OF_A_MACHINE = ("num_threads", "traceback", "cpu_kernels", "cuda_graphs")


def check_agreement(config: RunConfig) -> None:
    """A collective call, with the same outcome on all processes. Raises UserError naming the first difference."""
    settings = {key: value for key, value in to_dict(config).items() if key not in _OF_A_MACHINE}
    mine = {"host": socket.gethostname(), "versions": _versions(), "settings": settings}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    first = everyone[0]
    for rank, other in enumerate(everyone):
        pair = f"process {rank} ({other['host']}) and process 0 ({first['host']})"
        for what, there, here in differences(other["versions"], first["versions"]):
            raise UserError(
                f"{pair} differ in {what}: {there} and {here}; install the same code and libraries everywhere"
            )
        for key, there, here in differences(other["settings"], first["settings"]):
            raise UserError(
                f"{pair} were started with different settings, {key}={json.dumps(there)} and {json.dumps(here)}: "
                "give all the same command line"
            )


def check_same_text_everywhere(fingerprint: str) -> None:
    """A collective call. Raises UserError where a process has other text or another tokenizer than the first."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), fingerprint))
    first_host, first = everyone[0]
    for rank, (host, other) in enumerate(everyone):
        if other != first:
            raise UserError(
                f"process {rank} ({host}) and process 0 ({first_host}) have other text or another tokenizer "
                f"(fingerprints {other[:12]} and {first[:12]}): give all nodes the same files"
            )


def _versions() -> dict[str, str]:
    return {
        "Python's version": platform.python_version(),
        "torch's version": torch.__version__.partition("+")[0],
        "moe_train's code": code_digest(Path(__file__).resolve().parent.parent),
    }


def code_digest(folder: Path) -> str:
    """Twelve hex digits of all Python files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
