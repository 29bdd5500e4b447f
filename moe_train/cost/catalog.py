"""Today's rental prices from the public catalogues of providers, as hardware files of the user's own. Never needed.

The catalogues are collected by gpuhunt (extra `prices`), which fetches them from the network when it is asked, and only
then. A price is the median over providers of each one's cheapest on-demand offer, per GPU; the range is what they span.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from moe_train.compose import CONFIGS
from moe_train.errors import UserError, one_line

# Catalogue's name and memory (GB) of each hardware file; H100 there means the SXM card wherever a provider says which.
_NAMES = {
    "a100_40": ("A100", 40),
    "a100_80": ("A100", 80),
    "a10g": ("A10G", 24),
    "b200": ("B200", 180),
    "h100": ("H100", 80),
    "h200": ("H200", 141),
    "l4": ("L4", 24),
    "l40s": ("L40S", 48),
    "mi300x": ("MI300X", 192),
    "rtx_3090": ("RTX3090", 24),
    "rtx_4090": ("RTX4090", 24),
    "rtx_5090": ("RTX5090", 32),
    "rtx_6000_ada": ("RTX6000Ada", 48),
    "rtx_a6000": ("A6000", 48),
    "t4": ("T4", 16),
}


@dataclass(frozen=True)
class Quote:
    """US dollars an hour of one GPU, on demand."""

    hardware: str
    usd_per_hour: float
    low: float
    high: float
    by_provider: dict[str, float]


def known() -> list[str]:
    return sorted(_NAMES)


def quotes(names: Sequence[str]) -> list[Quote]:
    """Prices of the hardware named. Raises UserError without the library, the network or an offer."""
    for name in names:
        if name not in _NAMES:
            raise UserError(f"hardware={name} is in no catalogue: choose among {', '.join(known())}")
    try:
        import gpuhunt
    except ImportError:
        raise UserError("prices come through gpuhunt: pip install -e '.[prices]'") from None
    logging.getLogger("gpuhunt").setLevel(logging.CRITICAL)  # it logs a traceback for every provider
    catalog = gpuhunt.Catalog(balance_resources=False, auto_reload=False)
    try:
        catalog.load()
    except Exception as error:  # its own, urllib's, or of a damaged archive
        raise UserError(
            f"the catalogues cannot be fetched ({one_line(error)[:160]}): prices in configs/hardware stay as they are"
        ) from None
    return [_quote(name, catalog) for name in names]


def _quote(name: str, catalog: Any) -> Quote:
    gpu, memory = _NAMES[name]
    cheapest: dict[str, float] = {}
    for provider in catalog.catalog:
        offers = catalog.query(
            provider=provider, gpu_name=gpu, min_gpu_memory=memory, max_gpu_memory=memory, min_gpu_count=1, spot=False
        )
        each = [offer.price / offer.gpu_count for offer in offers if offer.price > 0]
        if each:
            cheapest[provider] = min(each)
    if not cheapest:
        raise UserError(f"no provider offers {name} on demand today: leave it out of hardware=")
    prices = list(cheapest.values())
    return Quote(name, round(statistics.median(prices), 4), round(min(prices), 4), round(max(prices), 4), cheapest)


def write_hardware_file(quote: Quote, folder: Path, today: date) -> Path:
    """`folder`/hardware/NAME_DATE.yaml: the file of configs/hardware at the quoted price. UserError if it is there."""
    content = yaml.safe_load((CONFIGS / f"hardware/{quote.hardware}.yaml").read_text())
    name = f"{quote.hardware}_{today:%Y_%m_%d}"
    content |= {
        "name": name,
        "price_usd_per_hour": quote.usd_per_hour,
        "price_range_usd_per_hour": [quote.low, quote.high],
        "price_source": f"median of the cheapest on-demand offers of {', '.join(sorted(quote.by_provider))} (gpuhunt)",
        "price_date": today.isoformat(),
    }
    path = folder / f"hardware/{name}.yaml"
    if path.exists():
        raise UserError(f"{path} exists already: remove it, or choose another out=")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"# {quote.hardware} at the rental prices of {today.isoformat()}.\n" + yaml.safe_dump(content, sort_keys=False)
    )
    return path
