"""The workspace "Cost" in wandb: what each run's loss, tokens and experts cost, side by side.

Built by wandb-workspaces, without a network. It names metrics as runs log them, and settings as runs have them;
`resolved` is what `auto` came to, which each run adds to its configuration in wandb.
"""

from __future__ import annotations

import json
from typing import Any

import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

NAME = "Cost"
_LOSSES = ["train/loss", "val/loss"]
_AXES = {
    "dollars": "cost/usd_total",
    "tokens": "progress/tokens",
    "FLOPs": "progress/flops",
    "seconds": "progress/seconds",
}
_COST, _SPEED, _USD = "cost/usd_per_million_tokens", "throughput/tokens_per_second", "cost/usd_total"
_RATES = {"Dollars per million tokens": _COST, "Tokens per second": _SPEED}
_BY = {"precision": "resolved.precision", "experts": "resolved.num_experts"}
_LOADS = {
    "fullest expert over the mean, less one": "max_violation",
    "evenness (entropy, 1 is even)": "load_entropy",
    "experts without a token": "dead_experts",
}
_EXCHANGED = {
    "bytes sent a step and process, by kind": r"comm/\w+/bytes",
    "seconds a step that it waited for, by kind": r"comm/\w+/exposed_seconds",
    "share of a step waited for": "comm/exposed_fraction",
}
_SORTED_BY = "cost/bits_per_byte_per_usd"
_COLUMNS = [
    f"summary:{_SORTED_BY}",
    *(f"summary:{name}" for name in ("val/bits_per_byte", _USD, _COST, _SPEED, "progress/tokens")),
    *(f"config:{setting}" for setting in (*_BY.values(), "resolved.hardware", "cost.sweep")),
]


def build(entity: str, project: str) -> ws.Workspace:
    return ws.Workspace(
        entity=entity, project=project, name=NAME, sections=sections(), runset_settings=table(), settings=_settings()
    )


def _settings() -> ws.WorkspaceSettings:
    return ws.WorkspaceSettings(x_axis=_AXES["tokens"], max_runs=50)


def table() -> ws.RunsetSettings:
    """The runs, the one that bought most with a dollar first."""
    order = [expr.Ordering(expr.Summary(_SORTED_BY), ascending=False)]
    return ws.RunsetSettings(order=order, pinned_columns=list(_COLUMNS))


def sections() -> list[ws.Section]:
    over = [
        panels.LinePlot(title=f"Loss over {name}", x=metric, y=_LOSSES, title_x=name, title_y="nats a token")
        for name, metric in _AXES.items()
    ]
    by = [_bars(title, metric, name) for title, metric in _RATES.items() for name in _BY]
    spent = [
        # Each run logs what its sweep had come to: the highest of them at a time is the sum so far.
        panels.LinePlot(
            title="Cumulative dollars by sweep",
            x="_timestamp",
            y=["cost/usd_sweep"],
            groupby=panels.Config("cost.sweep"),
            groupby_aggfunc="max",
            title_y="dollars",
        ),
        panels.BarPlot(
            title="Dollars by sweep, all runs shown",
            metrics=[_USD],
            groupby=panels.Config("cost.sweep"),
            groupby_aggfunc="sum",
        ),
    ]
    loads = [
        panels.LinePlot(title=title, x=_AXES["tokens"], metric_regex=rf"moe/layer_\d+/{name}", title_x="tokens")
        for title, name in _LOADS.items()
    ]
    exchanged = [
        panels.LinePlot(title=title, x=_AXES["tokens"], metric_regex=metric, title_x="tokens")
        for title, metric in _EXCHANGED.items()
    ]
    return [
        _section("Loss", over, columns=2),
        _section("Cost and speed", by, columns=2),
        _section("Spending", spent, columns=2),
        _section("Communication of several processes", exchanged, columns=3),
        _section("Expert load by layer", loads, columns=3),
    ]


def _bars(title: str, metric: str, by: str) -> panels.BarPlot:
    """Means of the runs alike in a setting, with the lowest and the highest."""
    return panels.BarPlot(
        title=f"{title} by {by}",
        metrics=[metric],
        groupby=panels.Config(_BY[by]),
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
    )


def _section(name: str, content: list[Any], columns: int) -> ws.Section:
    layout = ws.SectionLayoutSettings(columns=columns, rows=-(-len(content) // columns))
    return ws.Section(name=name, panels=content, is_open=True, layout_settings=layout)


def specification(workspace: ws.Workspace) -> dict[str, Any]:
    """What is sent to wandb when it is saved."""
    view = workspace._to_model()
    spec: dict[str, Any] = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))
    return {"name": view.display_name, "entity": view.entity, "project": view.project, "spec": spec}
