"""Backends have one interface, and what it offers is used."""

from __future__ import annotations

import inspect

import pytest

from moe_train.precision.backends import Backend
from moe_train.precision.compiled_fp8 import CompiledFp8
from moe_train.precision.cublas import Cublas
from moe_train.precision.emulated import Emulated

METHODS = [name for name, member in vars(Backend).items() if inspect.isfunction(member) and not name.startswith("_")]


def arguments(owner: type, method: str) -> list[tuple[str, object]]:
    """(role, whether by name alone) in order; a static function has the names of the kernel's own shapes."""
    found = list(inspect.signature(getattr(owner, method)).parameters.values())
    return [(each.kind.name, each.default) for each in found if each.name != "self"]


@pytest.mark.parametrize("method", METHODS)
def test_every_backend_takes_the_arguments_of_the_interface(method: str) -> None:
    backends: list[type] = [Emulated, CompiledFp8, Cublas]
    if pytest.importorskip("triton"):
        from moe_train.precision.triton_backend import Triton

        backends.append(Triton)
    for backend in backends:
        assert arguments(backend, method) == arguments(Backend, method)


def test_what_is_rounded_with_a_swiglu_is_its_rows_alone() -> None:
    """Along tokens its kept rows are rounded again, so no backend is asked to."""
    assert "columns" not in inspect.signature(Backend.swiglu).parameters
