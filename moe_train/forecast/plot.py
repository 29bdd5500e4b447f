"""The picture beside DeepSeek-V3's table: where its speed stands among published runs, and what price and speed do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

_INK, _ACCENT, _QUIET = "#222222", "#c2410c", "#94a3b8"


def plot_deepseek_v3(content: dict[str, Any], path: Path) -> None:
    """Write the figure to `path`, in the format its ending names (svg, png, pdf)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    runs = content["published"][::-1]
    colours = [_ACCENT if run["model"] == "DeepSeek-V3" else (_INK if run["kind"] == "moe" else _QUIET) for run in runs]
    left.barh([run["model"] for run in runs], [100 * run["utilization"] for run in runs], color=colours)
    left.set_xlabel("6 × active parameters × tokens, % of the BF16 peak")
    left.set_title("Published runs (MoE dark, DeepSeek-V3 in colour)", fontsize=10)
    left.tick_params(axis="y", labelsize=7)
    for share in sorted({cell["utilization"] for cell in content["sensitivity"]}):
        cells = [cell for cell in content["sensitivity"] if cell["utilization"] == share]
        right.plot(
            [cell["price_usd_per_hour"] for cell in cells],
            [cell["usd"] / 1e6 for cell in cells],
            color=_ACCENT if share == 0.39 else _QUIET,
            marker="o",
            markersize=3,
        )
        right.annotate(f" {share:.0%}", (cells[-1]["price_usd_per_hour"], cells[-1]["usd"] / 1e6), fontsize=8)
    pre_training = content["phases"][0]["usd"] / 1e6
    right.plot([content["price_usd_per_hour"]], [pre_training], "s", color=_ACCENT)
    right.annotate(
        f"the report: ${pre_training:.3f}M  ",
        (content["price_usd_per_hour"], pre_training),
        xytext=(-4, 14),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )
    right.set_xlabel("dollars an H800 hour")
    right.set_ylabel("millions of dollars, pre-training")
    right.set_title("The same tokens at other prices and shares of the BF16 peak", fontsize=10)
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.hashsalt": "moe_train"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
