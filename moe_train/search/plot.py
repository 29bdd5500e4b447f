"""The picture of a search: the front of two objectives, or one objective over each number that was searched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Content = dict[str, Any]


def plot(content: Content, path: Path) -> bool:
    """Write it to `path`, in the format its ending names (svg, png, pdf); whether there was something to draw."""
    two = len(content["objectives"]) == 2
    studies = [study for study in content["studies"] if study["points"]]
    if not studies:
        return False
    axes_of = [content["objectives"][1]] if two else _numbers(studies)
    rule = content["rule"] is not None and content["rule"]["a"] is not None
    count = len(axes_of) + rule
    figure, axes = plt.subplots(1, count, figsize=(5 * count, 4), squeeze=False, layout="constrained")
    for panel, name in zip(axes[0], axes_of):
        drawn: list[float] = []
        for study in studies:
            x = [point["values"][1] if two else _number(point, name) for point in study["points"]]
            known = [(a, point["values"][0]) for a, point in zip(x, study["points"]) if a is not None]
            panel.plot(*zip(*known), "o", markersize=4, label=study["study"])
            drawn += [a for a, _ in known]
        _finish(panel, name, content["objectives"][0], drawn)
    if content["front"]:
        line = sorted((point["values"][1], point["values"][0]) for point in content["front"])
        axes[0][0].plot(*zip(*line), "-", color="#222222", linewidth=1, drawstyle="steps-post", label="Pareto front")
        axes[0][0].legend(fontsize=7, frameon=False)
    if rule:
        _draw_rule(axes[0][-1], content["rule"])
    with matplotlib.rc_context({"svg.hashsalt": "moe_train"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return True


def _numbers(studies: list[Content]) -> list[str]:
    """The settings that are numbers in all points and not the same everywhere; without one, the dollars."""
    points = [point for study in studies for point in study["points"]]
    keys = [
        key
        for key in points[0]["settings"]
        if all(_number(point, key) is not None for point in points)
        and len({point["settings"][key] for point in points}) > 1
    ]
    return keys or ["usd_total"]


def _number(point: Content, name: str) -> float | None:
    value = {**point["figures"], **point["settings"]}.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _draw_rule(panel: Axes, rule: Content) -> None:
    x = [best["x"] for best in rule["bests"]]
    panel.plot(x, [best["y"] for best in rule["bests"]], "o", color="#c2410c")
    ends = [min(x), max(x)]
    panel.plot(ends, [rule["c"] * end ** rule["a"] for end in ends], "-", color="#222222", linewidth=1)
    panel.set_title(f"{rule['y']} = {rule['c']:.3g} × {rule['x']}^{rule['a']:.2f}", fontsize=9)
    _finish(panel, rule["x"], f"best {rule['y']}", x)
    panel.set_yscale("log")


def _finish(panel: Axes, x: str, y: str, drawn: list[float]) -> None:
    if drawn and min(drawn) > 0 and max(drawn) / min(drawn) > 5:
        panel.set_xscale("log")
    else:
        panel.locator_params(axis="x", nbins=5)
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.spines[["top", "right"]].set_visible(False)
    if panel.get_legend_handles_labels()[1]:
        panel.legend(fontsize=7, frameon=False)
