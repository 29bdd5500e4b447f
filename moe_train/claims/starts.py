"""Arms that start from another arm's run: whether they can, what they begin with, and whether they did.

The weights are that run's, or, where it is dense and the arm a mixture, what training/upcycle.py makes of them: in
`OUT/starts`, made once, after the one run and before the other.
"""

from __future__ import annotations

import json
from pathlib import Path

from moe_train.claims.plan import Arm, Plan, PlannedRun
from moe_train.claims.results import Folder, Result
from moe_train.errors import UserError

_NAME = "claim_start"  # of the model in the folder that is made


def check(plan: Plan) -> None:
    """Refuse, before any run, an arm whose model cannot begin with the other's weights. Raises UserError."""
    for arm in plan.arms.values():
        before = plan.claim.config.arms[arm.name].starts_from
        if before is not None:
            _check(plan, arm, before)


def _check(plan: Plan, arm: Arm, before: str) -> None:
    import torch

    from moe_train.model.transformer import Transformer
    from moe_train.model.upcycling import upcycled

    with torch.device("meta"):
        theirs, ours = (
            Transformer(each.config.model.resolved(), each.vocab_size).state_dict() for each in (plan.arms[before], arm)
        )
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    where = f"claim={plan.claim.name} scale={plan.scale_name}, arm {arm.name}: starts_from={before}"
    if not plan.upcycles(arm):
        for name in sorted(shapes.keys() ^ theirs.keys() or [n for n in shapes if shapes[n] != theirs[n].shape])[:1]:
            raise UserError(f"{where} is of another shape in {name}: give both the same model")
        return
    try:
        upcycled({name: torch.empty(tensor.shape) for name, tensor in theirs.items()}, arm.config.model, shapes, 0)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def ensure(run: PlannedRun, folder: Folder) -> None:
    """Make what `run` begins with, whose start is finished, where it is not there yet. Raises UserError."""
    place = _place(run)
    if run.start is None or (place is not None and (place / "checkpoints" / "step_0").is_dir()):
        return
    before = folder.runs.of(run.start.hash)
    for needed in (before, place):
        if needed is not None and needed.exists() and not any((needed / "checkpoints").glob("step_*")):
            where = needed.relative_to(needed.parent.parent)
            raise UserError(f"{where} has no checkpoint any more: remove the folder, and it is made again")
    if place is not None:
        from moe_train.training.upcycle import upcycle_run

        upcycle_run(before, place, run.config.model, _NAME, run.seed)


def problem(result: Result) -> str | None:
    """Why a run that should have started from another did not; None if it did.

    That it was told to is in its hash; here it is whose weights there were.
    """
    run, place = result.run, _place(result.run)
    if run.start is None or result.start is None or place is None:
        return None
    state = place / "checkpoints" / "step_0" / "state.json"
    try:
        if state.exists():
            origin = str(json.loads(state.read_text())["origin"])
        else:  # weights that were removed to save room: their origin heads the model's file, too
            origin = (place / "configs" / "model" / f"{_NAME}.yaml").read_text().splitlines()[0]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return f"{result.place}: what arm {run.arm} started from is not there any more ({place})"
    if not origin.endswith(f"{run.start.hash}, step {result.start.summary['steps']}"):
        return f"{result.place}: arm {run.arm} did not start from runs/{run.start.hash} ({origin})"
    return None


def _place(run: PlannedRun) -> Path | None:
    """Of the upcycled weights; None where a run starts from another's own, or from nothing."""
    given = run.config.init_from
    if run.start is None or given is None or Path(given).name == run.start.hash:
        return None
    return Path(given)
