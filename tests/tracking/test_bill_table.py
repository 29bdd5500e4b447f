"""Every dollar of a bill can be read, however narrow the terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from moe_train.cost.bill import KINDS, Bill, Row
from moe_train.tracking.bill_table import show
from moe_train.tracking.console import as_usd


def row(group: str, scale: float) -> Row:
    usd = {kind: scale * (number + 1.23456e-4) for number, kind in enumerate(KINDS, start=1)}
    return Row(group, 12, 14, device_hours=123.456, usd=usd, usd_total=sum(usd.values()))


@pytest.mark.parametrize("width", [60, 80, 130, 200])
def test_no_dollar_is_cut(width: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    bill = Bill([row(str(tmp_path / "outputs/one"), 1e-5), row("elsewhere", 7e-4)], row("total", 71e-5))
    said = io.StringIO()
    show(bill, "run", 0, Console(file=said, width=width))
    text = said.getvalue()
    for each in (*bill.rows, bill.total):
        for usd in (*each.usd.values(), each.usd_total):
            assert as_usd(usd) in text
    assert max(map(len, text.splitlines())) <= width
    assert "outputs/one" in text
    assert str(tmp_path) not in text
