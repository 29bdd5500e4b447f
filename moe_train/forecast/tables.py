"""Forecasts as tables in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_train.cost.fit import FitRow
from moe_train.tracking.console import as_usd

Figures = dict[str, Any]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def show_forecast(figures: Figures, console: Console | None = None) -> None:
    console = console or Console()
    memory, level = figures["memory"], figures["level"]
    table = _table(
        f"{figures['model']}: {figures['tokens']:,} tokens on {figures['num_devices']} × {figures['hardware']}, "
        f"{figures['precision']}",
        "",
        "forecast",
        f"{level:.0%} interval",
    )

    def row(name: str, key: str, form: str, scale: float = 1.0) -> None:
        found = figures[key]
        if found is None:
            table.add_row(name, "not known", "")
            return
        low, high = (form.format(found[side] * scale) for side in ("low", "high"))
        table.add_row(name, form.format(found["value"] * scale), f"{low} to {high}")

    table.add_row("parameters, active", f"{figures['total_params']:,}, {figures['active_params']:,}", "exact")
    table.add_row("FLOPs a token", f"{figures['flops_per_token']:.4g}", "exact")
    table.add_row("FLOPs", f"{figures['flops']:.4g}", "exact")
    row("share of the BF16 peak (6 × active)", "utilization_of_bf16_peak", "{:.1%}")
    row("model FLOPs utilisation", "model_flops_utilization", "{:.1%}")
    row("tokens/s", "tokens_per_second", "{:,.0f}")
    row("GPU-hours", "gpu_hours", "{:,.3g}" if figures["gpu_hours"]["value"] < 1000 else "{:,.0f}")
    row("days", "days", "{:,.3g}")
    row("dollars", "usd", "${:,.2f}")
    row("dollars at the market's prices", "usd_at_market_prices", "${:,.2f}")
    row("energy of the devices, kWh", "energy_kwh", "{:,.1f}")
    console.print(table)
    if figures["price_usd_per_hour"] is not None:
        source = figures["price_source"] or "no source given"
        console.print(
            Text(
                f"price: ${figures['price_usd_per_hour']:g} an hour and device, {source}, "
                f"{figures['price_date'] or 'undated'}"
            ),
            soft_wrap=True,
        )
    checkpointing = "with" if memory["activation_checkpointing"] else "without"
    parts = _table(
        f"memory of one device at the peak of a step ({memory['peak_moment']}): {memory['layout']['name']}, "
        f"{memory['micro_batch']} sequences at once, {checkpointing} activation checkpointing, {memory['optimizer']}",
        "part",
        "GB (10⁹ bytes)",
    )
    for part, size in memory["parts"].items():
        parts.add_row(part.replace("_", " "), f"{size / 1e9:,.3f}")
    parts.add_section()
    fits = {True: "fits", False: "does not fit", None: "memory of the device not known"}[memory["fits"]]
    room = "" if memory["usable_bytes"] is None else f", of {memory['usable_bytes'] / 1e9:,.1f} usable"
    parts.add_row(f"together: {fits}{room}", f"{memory['peak_bytes'] / 1e9:,.3f}")
    console.print(parts)
    _notes(console, figures["notes"])


def _notes(console: Console, notes: list[str]) -> None:
    for note in notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)


def show_probe(content: Figures, console: Console | None = None) -> None:
    console = console or Console()
    table = _table(
        f"{content['model']}: {content['tokens']:,} tokens here, from {content['num_devices']} × {content['device']}",
        "",
        "forecast",
        "at the probe's fastest and slowest",
    )

    def row(name: str, key: str, form: str) -> None:
        found = content[key]
        if found is None:
            table.add_row(name, "not known", "")
            return
        low, high = (form.format(found[side]) for side in ("low", "high"))
        table.add_row(name, form.format(found["value"]), f"{low} to {high}")

    row("tokens/s", "tokens_per_second", "{:,.0f}")
    row("seconds of training", "train_seconds", "{:,.1f}")
    row("seconds in all", "wall_seconds", "{:,.1f}")
    row("dollars in all", "usd_total", "${:.3g}")
    row("energy, kWh", "energy_kwh", "{:.3g}")
    console.print(table)
    if "against" not in content:
        return
    compared = _table(f"forecast against {content['against']['run']}", "", "forecast over what it took", "in interval")
    for name, key in (
        ("seconds in all", "wall_seconds"),
        ("dollars", "usd_total"),
        ("tokens/s", "tokens_per_second"),
    ):
        found = content["against"][key]
        ratio = "not known" if found is None else f"{found['ratio']:.3f}"
        compared.add_row(name, ratio, "" if found is None else "yes" if found["held"] else "no")
    console.print(compared)


def show_published(content: Figures, console: Console | None = None) -> None:
    console = console or Console()
    table = _table(
        "published runs, each predicted from the others",
        "model",
        "kind",
        "published GPU-hours",
        "predicted",
        f"{content['level']:.0%} interval",
        "ratio",
    )
    for row in content["rows"]:
        low, high = row["interval"]
        table.add_row(
            row["model"],
            row["kind"],
            f"{row['published_gpu_hours']:,.0f}",
            f"{row['predicted_gpu_hours']:,.0f}",
            f"{low:,.0f} to {high:,.0f}" + ("" if row["held"] else " ✗"),
            f"{row['ratio']:.2f}",
        )
    console.print(table)
    compared = _table("how near", "", "median error", "within ×1.5")
    for name, prefix in (
        ("fitted model, each run left out", ""),
        ("the same, its ridge chosen without the run too", "nested_"),
        ("constants, 35% dense and 22% MoE, in sample", "baseline_"),
    ):
        compared.add_row(name, f"{content[prefix + 'median_error']:.1%}", f"{content[prefix + 'within_1_5x']:.1%}")
    console.print(compared)
    console.print(
        Text(f"intervals meant to hold {content['level']:.0%} of the time held {content['interval_coverage']:.1%}")
    )
    _notes(console, content["notes"])


def show_fit(rows: list[FitRow], hardware: str, console: Console | None = None) -> None:
    console = console or Console()
    table = _table(
        f"what fits one {hardware} (recomputing: with activation_checkpointing=true)",
        "model",
        "sequences at once",
        "recomputing",
        "longest one",
        "to recompute",
        "peak of one, GB",
    )
    for row in rows:
        needs = {True: "needed", False: "not needed", None: "does not fit"}[row.needs_activation_checkpointing]
        table.add_row(
            row.model,
            f"{row.largest_micro_batch} × {row.sequence_length:,}",
            f"{row.largest_micro_batch_with_checkpointing} × {row.sequence_length:,}",
            f"{row.longest_sequence:,}",
            needs,
            f"{row.peak_bytes / 1e9:,.2f}",
        )
    console.print(table)


def show_deepseek_v3(content: Figures, console: Console | None = None) -> None:
    console = console or Console()
    table = _table("DeepSeek-V3 (arXiv 2412.19437, table 1)", "phase", "H800 hours", "at $2 an hour")
    for phase in content["phases"]:
        table.add_row(phase["phase"], f"{phase['gpu_hours']:,}", f"${phase['usd']:,}")
    table.add_section()
    table.add_row("together", f"{content['gpu_hours']:,}", f"${content['usd']:,}")
    console.print(table)
    implied = _table("what pre-training implies", "", "")
    low, high = content["predicted_interval"]
    mixed = content["mixed_precision_utilization"]
    for name, value in (
        ("parameters, active", f"{content['total_params'] / 1e9:.2f}B, {content['active_params'] / 1e9:.2f}B"),
        ("GFLOPs a token, 4K causal", f"{content['flops_per_token'] / 1e9:.1f}"),
        ("tokens/s and GPU", f"{content['tokens_per_second_per_gpu']:,.0f}"),
        ("TFLOP/s and GPU", f"{content['tflops_per_gpu']:.0f}"),
        ("share of the BF16 peak", f"{content['share_of_bf16_peak']:.1%}"),
        ("share of the FP8 peak", f"{content['share_of_fp8_peak']:.1%}"),
        ("of what its mix of formats could do", "not known" if mixed is None else f"{mixed:.1%}"),
        ("rank among the published runs", f"{content['rank_among_published']} of {len(content['published'])}"),
        (
            "GPU-hours predicted from the others",
            f"{content['predicted_gpu_hours']:,.0f} ({low:,.0f} to {high:,.0f})",
        ),
        (
            f"{content['peer']} at the same price",
            f"{as_usd(content['peer_usd'])}, {content['peer_ratio']:.1f} times the GPU-hours",
        ),
        ("energy of the GPUs, all three phases, kWh", _span(content["energy_kwh"], "{:,.0f}")),
        (f"the same at ${content['usd_per_kwh']:g} a kWh", _span(content["usd_energy"], "${:,.0f}")),
        (
            f"wear in all phases of GPUs bought at the price of an {content['ownership_of'].upper()}, for three years",
            "not known" if content["usd_ownership"] is None else as_usd(content["usd_ownership"]),
        ),
    ):
        implied.add_row(name, value)
    console.print(implied)
    prices = sorted({cell["price_usd_per_hour"] for cell in content["sensitivity"]})
    moved = _table(
        "pre-training, in millions of dollars, at other prices and speeds",
        "share of the BF16 peak",
        *(f"${price:g} an hour" for price in prices),
    )
    for share in sorted({cell["utilization"] for cell in content["sensitivity"]}):
        cells = [cell["usd"] for cell in content["sensitivity"] if cell["utilization"] == share]
        moved.add_row(f"{share:.0%}", *(f"{usd / 1e6:.2f}" for usd in cells))
    console.print(moved)
    console.print("left out:")
    for item in content["left_out"]:
        console.print(Text(f"- {item}"), soft_wrap=True)


def _span(three: list[float], form: str) -> str:
    low, value, high = (form.format(each) for each in three)
    return f"{value} ({low} to {high})"
