"""The versions in a run's record: those at work, which an installation of another clone need not be."""

from __future__ import annotations

from importlib import metadata

import pytest

import moe_train
from moe_train.versions import versions_with


def test_a_clone_that_is_not_installed_says_its_own_version(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version

    def not_installed(name: str) -> str:
        if name == "moe_train":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "version", not_installed)
    assert versions_with("torch") == versions_with() | {"torch": installed("torch")}
    assert versions_with()["moe_train"] == moe_train.__version__
