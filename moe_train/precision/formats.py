"""The format that products are done in where no recipe rounds them further."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The format products of `x` are done in: autocast's where it is on for its device, else its own."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype  # as on the meta device, which has no autocast
