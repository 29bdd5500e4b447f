"""A claim's curves as one SVG: loss over tokens, FLOPs, seconds and dollars, and the load of the experts.

Seconds and dollars are left out where runs were not timed alone.
"""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

_LABELS = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds of training", "usd": "dollars of training"}


def svg(claim: dict[str, Any]) -> str:
    """The element alone, to stand inside a page; empty where there are no curves."""
    curves = claim["curves"]
    if not curves:
        return ""
    loads = {arm: curve for arm, curve in curves.items() if "load" in curve}
    timed = not claim["axes"] or any(pair["axes"]["seconds"] is not None for pair in claim["axes"])
    shown = _LABELS if timed else ("tokens", "flops")  # what is not compared is not drawn side by side
    panels = [axis for axis in shown if all(curve[axis] is not None for curve in curves.values())]
    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": claim["claim"],
            "font.size": 8,
            "font.sans-serif": ["DejaVu Sans"],  # a list would stand beside every tick
        }
    ):
        count = len(panels) + bool(loads)
        figure, axes = plt.subplots(1, count, figsize=(3.2 * count, 2.8), squeeze=False)
        figure.subplots_adjust(left=0.2 / count, right=0.99, bottom=0.18, top=0.96, wspace=0.3)
        for panel, axis in zip(axes[0], panels):
            for index, (arm, curve) in enumerate(curves.items()):
                _draw(panel, curve[axis], curve["loss"], arm, index)
            panel.set_xlabel(_LABELS[axis])
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
            panel.xaxis.set_minor_locator(NullLocator())
        axes[0][0].set_ylabel("training loss, nats a token")
        if loads:
            for index, (arm, curve) in enumerate(curves.items()):
                if arm in loads:
                    _draw(axes[0][-1], curve["tokens"], curve["load"], arm, index)
            axes[0][-1].set_xlabel("tokens")
            axes[0][-1].xaxis.set_major_formatter(EngFormatter(sep=""))
            axes[0][-1].set_ylabel("MaxVio")
        axes[0][0].legend(fontsize=7, frameon=False)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        plt.close(figure)
    element = written.getvalue()
    element = element[element.index("<svg") :]
    # Names of parts are shared by all figures of a page.
    own = re.sub(r"\W", "", f"{claim['claim']}{claim['scale']}")
    element = re.sub(r'((?:id="|url\(#|xlink:href="#))', rf"\g<1>{own}", element)
    return re.sub(r'(?<= d=")[^"]+', lambda path: re.sub(r"-?\d+\.\d+", _to_a_tenth, path[0]), element)


def _to_a_tenth(number: re.Match[str]) -> str:
    """Of a point, which is an eighth of a pixel."""
    return f"{float(number[0]):.1f}".removesuffix(".0")


def _draw(panel: Axes, x: list[float], band: dict[str, list[float]], arm: str, index: int) -> None:
    colour = f"C{index}"
    panel.plot(x, band["mean"], color=colour, label=arm, linewidth=1.2)
    panel.fill_between(x, band["low"], band["high"], color=colour, alpha=0.2, linewidth=0)
    panel.spines[["top", "right"]].set_visible(False)
