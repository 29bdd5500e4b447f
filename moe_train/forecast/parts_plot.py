"""The picture of a run put together from parts: GPU-hours by part, those that are hidden beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

_INK, _QUIET = "#222222", "#cbd5e1"


def plot_parts(content: dict[str, Any], path: Path) -> None:
    """Write the figure to `path`, in the format its ending names (svg, png, pdf)."""
    by_part, hidden = content["gpu_hours_by_part"], content["hidden_gpu_hours"]
    names = sorted({**by_part, **hidden}, key=lambda name: by_part.get(name, 0.0))
    figure, axes = plt.subplots(figsize=(9, 0.38 * len(names) + 1.6), layout="constrained")
    seen = [by_part.get(name, 0.0) / 1e3 for name in names]
    axes.barh(names, seen, color=_INK, label="seen in the step")
    behind = [hidden.get(name, 0.0) / 1e3 for name in names]
    axes.barh(names, behind, left=seen, color=_QUIET, label="hidden behind products")
    axes.set_xlabel(f"thousands of GPU-hours for {content['tokens']:.3g} tokens")
    axes.set_title(
        f"{content['model']} on {content['num_devices']} {content['hardware'].upper()}: "
        f"{content['gpu_hours'] / 1e3:,.1f}K GPU-hours from parts"
        + (
            ""
            if content["published_gpu_hours"] is None
            else f", {content['published_gpu_hours'] / 1e3:,.0f}K published"
        ),
        fontsize=10,
    )
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.hashsalt": "moe_train"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
