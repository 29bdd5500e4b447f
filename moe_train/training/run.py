"""One training run from configuration to summary: what is set up in which order, and how it ends, whatever ends it.

runtime → run folder → data, model, optimizers (parts.py) → account → loop.py → summary
"""

from __future__ import annotations

from collections.abc import Callable

from moe_train.config import RunConfig
from moe_train.cost.attempt import FAILED
from moe_train.errors import UserError
from moe_train.parallel.signs_of_life import FailedAlone, LostProcesses, is_of_the_network
from moe_train.tracking.console import print_notes
from moe_train.tracking.progress import check_console
from moe_train.training import before_first_step
from moe_train.training import summary as summaries
from moe_train.training.account import Account
from moe_train.training.keepers import end_with_launcher, end_with_sweep, launcher
from moe_train.training.loop import Run
from moe_train.training.parts import Shared, known_to_all
from moe_train.training.run_folder import RunFolder, open_run_folder
from moe_train.training.runtime import Runtime, start_runtime


def train(config: RunConfig) -> None:
    """Make the run `config` describes, or go on with it, and write its folder. Raises UserError."""
    before_first_step.unwind()
    end_with_sweep()
    started_by = launcher()
    # Process groups are left as they are, for the process to end with (train.py): taking them apart joins threads of
    # gloo's, and once in a few dozen runs one of them did not wake up.
    runtime = start_runtime(config)
    before_first_step.hold()
    folder = _open_folder(config, runtime)
    shared: Shared | None = None
    account: Account | None = None
    look_for_launcher: Callable[[], None] | None = None
    try:
        before_first_step.release()
        if folder is not None and folder.finished_summary is not None:
            print_notes(["this run is finished already: nothing is done"])
            summaries.show(folder.finished_summary, folder.path, None)
        if runtime.from_main(folder is not None and folder.finished_summary is not None):
            return
        shared = known_to_all(runtime, folder)
        if shared.signs is not None and started_by is not None:
            look_for_launcher = end_with_launcher(started_by, shared.signs.say)
        account = Account(config, runtime)
        if folder is not None:
            account.open_ledger(folder.path, shared.checkpoint.state if shared.checkpoint else None)
        run = Run(config, runtime, folder, account, shared)
    except BaseException as error:
        said = _not_begun(error, runtime, folder, shared, account)
        if said is error:
            raise
        raise said from error
    try:
        run.train()
    except BaseException as error:
        run.abandon()
        if run.signs is not None:
            run.signs.failed(error)
            if is_of_the_network(error):
                raise LostProcesses(run.signs, runtime.world_size, run.saving.saved_step) from error
        raise
    if run.interrupted is not None:
        if look_for_launcher is not None:
            look_for_launcher()
        run.interruption.hand_on()
        raise summaries.Interrupted(run.interrupted, run.steps_done)


def _not_begun(
    error: BaseException, runtime: Runtime, folder: RunFolder | None, shared: Shared | None, account: Account | None
) -> BaseException:
    """Clear away what a run that could not begin has made; returns what is to be said of it."""
    checkpoint = None if shared is None else shared.checkpoint
    saved_step = None if checkpoint is None else checkpoint.step
    end = before_first_step.asked(saved_step)
    signs = None if shared is None else shared.signs
    if account is not None:
        account.close(FAILED if end is None else "interrupted")
    if signs is not None and end is None:
        signs.failed(error)
        if is_of_the_network(error):  # another failed alone: the folder stays, since its log says why
            lost = LostProcesses(signs, runtime.world_size, saved_step)
            if (end := before_first_step.asked(saved_step)) is None:  # or was told to end before this one was
                return lost
        elif isinstance(error, Exception) and signs.failed_alone():
            return FailedAlone(signs, error)
    if end is not None and signs is not None:
        signs.say(str(end))
    if folder is not None:
        folder.discard()
    elif end is not None and shared is not None and shared.fresh and signs is not None:
        signs.discard()  # written after the first process, which is told to end as well, had taken the folder away
    return error if end is None else end


def _open_folder(config: RunConfig, runtime: Runtime) -> RunFolder | None:
    """Rank 0 opens the folder; if it cannot, all ranks end rather than wait for it."""
    folder, failure = None, None
    if runtime.is_main:
        try:
            check_console(config.tracking.console)
            folder = open_run_folder(config)
        except UserError as error:
            failure = error
    failure = runtime.from_main(failure)
    if failure is not None:
        raise failure
    return folder
