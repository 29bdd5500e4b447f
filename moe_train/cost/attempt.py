"""One process of a run and what it took: the line of account that the run's folder and the shared ledger both keep."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from moe_train.config import Purpose
from moe_train.config.fields import NonNegative

RUNNING, KILLED, FINISHED, FAILED = "running", "killed", "finished", "failed"


def now() -> str:
    """ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _with_a_zone(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a moment needs its time zone")
    return text


Moment = Annotated[str, AfterValidator(_with_a_zone)]  # ISO 8601


@dataclass(config=ConfigDict(extra="ignore", strict=True))
class Attempt:
    """Seconds are of this process alone, without earlier attempts; dollars and energy of all its devices.

    `usd` prices the wall clock, `usd_train` the training steps, `usd_energy` is the part of `usd` that is the energy
    bill of owned devices. None is unknown.
    """

    # What it belongs to.
    run: str | None = None  # the run's folder
    name: str | None = None
    project: str | None = None
    sweep: str | None = None
    claim: str | None = None
    purpose: Purpose | None = None
    config_hash: str | None = None
    seed: int | None = None
    # What it is charged by.
    hardware: str | None = None
    num_devices: int = 1
    num_threads: int | None = None
    basis: str = "rental"
    price_usd_per_hour: NonNegative | None = None  # of one device
    price_source: str | None = None
    # What it took.
    status: str = RUNNING  # finished, interrupted, out_of_budget, failed, killed
    wall_seconds: NonNegative = 0.0
    train_seconds: NonNegative = 0.0
    lost_seconds: NonNegative = 0.0  # train seconds of earlier attempts that no checkpoint held: done again here
    tokens: int = 0
    energy_kwh: NonNegative | None = None
    usd: NonNegative | None = None
    usd_train: NonNegative | None = None
    usd_energy: NonNegative | None = None
    started_at: Moment = Field(default_factory=now)
    updated_at: Moment = Field(default_factory=now)
    id: str = Field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def usd_lost(self) -> float:
        """What the seconds done again cost, at this attempt's price."""
        return self.lost_seconds / 3600 * self.num_devices * (self.price_usd_per_hour or 0.0)


_ATTEMPT = TypeAdapter(Attempt)


def read_attempt(line: str | bytes) -> Attempt:
    """From one line of JSON. Raises ValueError (of pydantic too) where it is none, or has no id to know it by."""
    attempt = _ATTEMPT.validate_json(line)
    if '"id"' not in (line.decode() if isinstance(line, bytes) else line):
        raise ValueError("no id")
    return attempt


def as_line(attempt: Attempt) -> str:
    return _ATTEMPT.dump_json(attempt).decode()


def as_dict(attempt: Attempt) -> dict[str, Any]:
    content: dict[str, Any] = _ATTEMPT.dump_python(attempt)
    return content
