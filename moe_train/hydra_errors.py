"""hydra's and omegaconf's own complaints, in one line with the remedy: the key, the nearest that exists, the file."""

from __future__ import annotations

import difflib
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf

from moe_train.errors import UsageError, UserError, one_line

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def explain_hydra_error(error: Exception, config_dir: Path | None = None) -> UserError:
    """hydra's and omegaconf's own complaints, in one line with the remedy. config_dir: a folder of the user's own."""
    if isinstance(error, UnicodeDecodeError | yaml.YAMLError):
        for folder in (config_dir, CONFIGS):
            for file in sorted(folder.rglob("*.yaml")) if folder is not None else ():
                if reason := _unreadable(file):
                    return UserError(f"{file} cannot be read ({reason}): put it right, or choose another file")
    text = one_line(error)
    cause = one_line(error.__cause__) if error.__cause__ else ""
    if of_a_cluster := _explain_cluster_error(error, text):
        return of_a_cluster
    if found := re.search(r"Could not override '?([\w./]+)'?\. No match in the defaults list", text):
        if found[1] == "claim":
            return UserError("claim= is no setting of a run: python scripts/reproduce.py claim=NAME scale=cpu")
        if (CONFIGS / found[1]).is_dir():
            return UserError(
                f"{found[1]} cannot be chosen here, since the file of this choice gives its keys one by one: set them, "
                f"as in {found[1].replace('/', '.')}.KEY=…"
            )
        return UserError(f"unknown group {found[1]}: see the folders of configs/")
    if found := re.search(r"Could not override '([^']+)'", text):
        key = found[1]
        if "is not in struct" in cause or "is not in struct" in text or "not in" in cause:
            return UserError(f"unknown key {key}{_suggestion_from_files(key)}")
        return UserError(f"cannot set {key}: {cause or text}")
    if found := re.search(r"Could not find '([^']+)'", text):
        options = re.search(r"Available options in '[^']+': (.*?)(?: Config search path|$)", text)
        choices = re.sub(r"\s+", ", ", options[1].strip()) if options else ""
        own = " (one of your own: DIR/model/NAME.yaml and --config-dir DIR)" if found[1].startswith("model/") else ""
        return UserError(
            f"there is no {'='.join(found[1].rsplit('/', 1))}" + (f": choose one of {choices}{own}" if choices else "")
        )
    if found := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return UserError(f"{found[1]} has several values: give one, or with train.py -m for a run of each")
    if "Config group override must be a string or a list" in text:
        return UserError(
            "a group takes the name of one of its files, not null (a part is left out with a dot, as in model.moe=null)"
        )
    if isinstance(error, ConfigCompositionException):
        return UserError(f"configuration: {text}")
    if isinstance(error, HydraException):  # the override grammar
        return UsageError(
            f"cannot read the command line: {text} (write key=value; quote values with special characters)"
        )
    return UserError(f"configuration: {text}")


def _explain_cluster_error(error: Exception, text: str) -> UserError | None:
    """What hydra's launcher for clusters (extra `slurm`) says, and hydra where that is not installed."""
    if "Could not find 'hydra/launcher/submitit_" in text and find_spec("submitit") is None:
        return UserError('hydra/launcher=submitit_slurm is not installed: pip install -e ".[slurm]"')
    if "srun" in text and "slurm cluster" in text:
        return UserError("there is no SLURM on this machine (no srun): hydra/launcher=submitit_local tries it here")
    if type(error).__module__.startswith("submitit.") and (found := re.search(r"with path (\S+) has", text)):
        return UserError(f"a job of the cluster was killed or lost: what it said is in {Path(found[1]).parent}")
    return None


def _unreadable(file: Path) -> str | None:
    """What is wrong with a file that is no YAML text, None if nothing is; hydra's error does not name the file."""
    try:
        yaml.safe_load(file.read_text())
    except UnicodeDecodeError:
        return "it is no UTF-8 text"
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        return f"it is no YAML: {one_line(error.problem)}{line}"
    except yaml.YAMLError as error:
        return f"it is no YAML: {one_line(error)}"
    return None


def _suggestion_from_files(key: str) -> str:
    """The nearest key among all that stand in configs/, since hydra's error does not say which exist."""
    known = {f"hydra.launcher.{name}" for name in ("jobs", "processes", "runs")}  # of hydra/launcher=accelerate
    for file in CONFIGS.rglob("*.yaml"):
        groups = file.relative_to(CONFIGS).parent.parts
        if groups[:1] in (("debug",), ("experiment",), ("claim",), ("sweep",), ("wandb",)):
            continue
        known |= _dotted(OmegaConf.load(file), ".".join(groups))
    if key in known:
        group = Path(*key.split(".")[:-1])
        while not (CONFIGS / group).is_dir():  # a part of a file has no folder
            group = group.parent
        return f" with these choices: it comes with another file of configs/{group}"
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.6)
    return f": did you mean {near[0]}?" if near else ": see configs/ for the keys there are"


def _dotted(node: Any, prefix: str) -> set[str]:
    if not isinstance(node, DictConfig):
        return set()
    keys: set[str] = set()
    for key in node:
        name = f"{prefix}.{key!s}" if prefix else str(key)
        keys |= {name} | _dotted(node._get_node(key), name)
    return keys
