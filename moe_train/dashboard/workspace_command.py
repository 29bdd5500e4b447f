"""`scripts/dashboard.py wandb …`: creates the workspace "Cost" in a project of wandb, renews it, or prints it.

It is known by the name of its address, which is the same in every project, never by the title "Cost" that another may
have too: so there is never a second one, and none but this is touched. Renewing it puts its own sections and the table
as they are here; sections of other names, filters, grouping and colours stay as they were chosen there.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from moe_train.cli import parse_arguments
from moe_train.errors import UserError, one_line

if TYPE_CHECKING:
    import wandb_workspaces.workspaces as ws

USAGE = "python scripts/dashboard.py wandb [entity=NAME] [project=moe_train] [dry_run=true]"
_ADDRESS = "moetraincost"  # ?nw=… of its address; wandb's own are random


def _one_name(value: str) -> str:
    if not value.strip() or "/" in value:
        raise ValueError("give one name, as in wandb.ai/ENTITY/PROJECT")
    return value


Name = Annotated[str, AfterValidator(_one_name)]


@dataclass
class Arguments:
    entity: Name | None = None  # None: the account's own
    project: Name = "moe_train"
    dry_run: bool = False


def main(arguments: list[str]) -> None:
    """Says in one line what there is now. Raises UserError."""
    given = parse_arguments(Arguments, arguments, usage=USAGE)
    try:
        from moe_train.dashboard import workspace
    except ImportError:
        raise UserError("workspaces come through wandb-workspaces: pip install -e '.[workspace]'") from None
    if given.dry_run:
        content = workspace.specification(workspace.build(given.entity or "", given.project))
        sys.stdout.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return
    entity = _signed_in(given.entity)
    try:
        existing = _existing(entity, given.project)
        saved = workspace.build(entity, given.project) if existing is None else existing
        if existing is not None:
            own = workspace.sections()
            names = {section.name for section in own}
            saved.sections = [*own, *(section for section in saved.sections if section.name not in names)]
            table = workspace.table()
            saved.runset_settings.order = table.order
            saved.runset_settings.pinned_columns = table.pinned_columns
        saved._internal_name = f"nw-{_ADDRESS}-v"
        saved.save()
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"wandb did not take the workspace ({one_line(error) or type(error).__name__}): check entity={entity}, "
            f"project={given.project} and the network, or see it with dry_run=true"
        ) from None
    done = "created" if existing is None else "renewed (its own sections; what was added or filtered there stays)"
    sys.stdout.write(f"workspace {workspace.NAME} {done}: {saved.url}\n")


def _signed_in(entity: str | None) -> str:
    import wandb

    from moe_train.tracking.wandb_run import finds_api_key

    if not finds_api_key(wandb):
        raise UserError("wandb finds no API key: run `wandb login`, or see the workspace with dry_run=true")
    try:
        own = entity or wandb.Api().default_entity
    except Exception as error:
        raise UserError(f"wandb cannot be reached ({one_line(error)}): try again, or give dry_run=true") from None
    if not own:
        raise UserError("the account has no entity of its own: give entity=NAME")
    return str(own)


def _existing(entity: str, project: str) -> ws.Workspace | None:
    """Ours, as it is in wandb now. UserError where there is no such project."""
    import wandb_workspaces.workspaces as ws

    try:  # the address of another server would be taken alike
        existing: ws.Workspace = ws.Workspace.from_url(f"https://wandb.ai/{entity}/{project}?nw={_ADDRESS}")
        return existing
    except ValueError as error:
        if "not found in project" in str(error):
            return None
        if "not found" in str(error):
            raise UserError(
                f"there is no project {entity}/{project} in wandb, or no access to it: send a run there first "
                "(tracking.wandb=online), or check entity= and project="
            ) from None
        raise
