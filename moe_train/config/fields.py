"""The types settings are made of: numbers with their bounds, and the strictness that every group shares."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", strict=True)


def _whole(value: Any) -> Any:
    """1e6 on a command line is a float: take it where a whole number is meant."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _whole_number(text: Any) -> Any:
    """1e9 and 1_000 as a user may write them on a script's command line."""
    try:
        return _whole(float(text)) if isinstance(text, str) and "e" in text.lower() else text
    except ValueError:
        return text


Amount = Annotated[int, BeforeValidator(_whole_number), Field(gt=0, le=10**18)]  # of a script, given as text
Positive = Annotated[int, BeforeValidator(_whole), Field(gt=0, le=10**18)]
Size = Annotated[int, BeforeValidator(_whole), Field(gt=0, le=10**6)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=10**18)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1e3)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
