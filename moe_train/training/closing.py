"""What still has to be done after the last step, how long that will take, and evaluating within the limits of the run.

Seconds and dollars cover the whole process, so a run that ends by them must stop early enough. An estimate from the
steps was three times off beside other work on the cores: evaluation and checkpoint are timed once, early in the run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from moe_train.config import RunConfig
from moe_train.data.packing import PreparedData
from moe_train.model.transformer import Transformer
from moe_train.training.account import Account
from moe_train.training.evaluation import Evaluation, evaluate
from moe_train.training.runtime import Runtime

# A whole evaluation took up to 8% longer than its first batches foretold; one cut short is of other text.
_MARGIN = 1.2


class Closing:
    """Evaluation, checkpoint and tracker of one run: what they took, and will take at its end."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        account: Account,
        model: Transformer,
        data: PreparedData,
        micro_batch_size: int,
    ) -> None:
        self._config, self._runtime, self._account = config, runtime, account
        self._model, self._data, self._micro_batch_size = model, data, micro_batch_size
        self._seconds_per_token: float | None = None  # of an evaluation, once one was timed
        self._checkpoint_seconds = 0.0  # of the last one
        self._tracker_seconds = 0.0  # to begin, which takes about as long as to end
        self.evaluation_seconds = 0.0  # spent so far

    @contextmanager
    def timing_the_tracker(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._tracker_seconds = time.monotonic() - began

    def checkpoint_took(self, seconds: float) -> None:
        self._checkpoint_seconds = seconds

    def reserve_seconds(self) -> float:
        """Wall clock to keep back for what follows the last step, and for that step, which runs over the limit."""
        rate, meter = self._seconds_per_token, self._account.meter
        if rate is None:  # until it is timed: a forward pass is a third of a step's work
            rate = meter.train_seconds / meter.tokens / 3 if meter.tokens else 0.0
        tokens = min(len(self._data.val), self._config.eval.max_tokens or len(self._data.val))
        step = meter.attempt_train_seconds / meter.steps_of_attempt if meter.steps_of_attempt else 0.0
        return _MARGIN * rate * tokens + self._checkpoint_seconds + self._tracker_seconds + step

    def rehearsal_is_due(self) -> bool:
        """Once, after a step that no longer warms up, where the clock ends the run."""
        untimed = self._account.limits.uses_clock and self._seconds_per_token is None
        return untimed and self._account.meter.steps_of_attempt >= 2

    def rehearse(self) -> None:
        """Time a little of the evaluation; the first time warms up."""
        for _ in range(2):
            self.evaluate(2 * self._micro_batch_size * self._config.data.sequence_length)

    def leaves_time_for_another(self) -> bool:
        """Whether an evaluation in the middle of the run still lets it go on. Asked on all ranks or none."""
        reserve = self.reserve_seconds()
        left = self._account.seconds_left(reserve)
        return left is None or left > 2 * reserve

    def evaluate(self, max_tokens: int | None) -> Evaluation | None:
        """Loss on the validation split, or on as much of it as a limit in seconds or dollars leaves time for."""
        after = self._checkpoint_seconds + self._tracker_seconds

        def out_of_time() -> bool:
            left = self._account.seconds_left(after)
            return left is not None and left <= 0

        began = time.monotonic()
        evaluation = evaluate(
            self._model,
            self._data,
            self._runtime,
            sequence_length=self._config.data.sequence_length,
            batch_size=self._micro_batch_size,
            max_tokens=max_tokens,
            out_of_time=out_of_time if self._account.limits.uses_clock else None,
        )
        seconds = time.monotonic() - began
        self.evaluation_seconds += seconds
        if evaluation is not None:
            self._seconds_per_token = seconds / evaluation.tokens
        return evaluation
