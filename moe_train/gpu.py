"""Whether work is done on a GPU: asked here alone, so that no two parts of a command answer differently.

A run, what is generated and evaluated with it, and the suite that compares them are figures of one device.
"""

from __future__ import annotations

import os

_YES = ("1", "true", "t", "yes", "y", "on")  # as accelerate reads it


def cpu_is_asked_for() -> bool:
    """By ACCELERATE_USE_CPU, whatever GPU there is."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in _YES


def takes_gpu() -> bool:
    """Imports torch, which takes seconds."""
    import torch

    return not cpu_is_asked_for() and torch.cuda.is_available()
