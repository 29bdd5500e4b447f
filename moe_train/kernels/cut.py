"""Whether a weight is cut over processes, asked without torch's module for that.

Loading `torch.distributed.tensor` is 0.5 s of every start on two cores, and 2.3 s where files are read slowly (a
container on an H200, 2026-11-27), for a class that most runs have no object of.
"""

from __future__ import annotations

from torch import Tensor


def is_cut(tensor: Tensor) -> bool:
    """Whether it is one of FSDP2's (a DTensor), of which a process holds a part."""
    return hasattr(tensor, "device_mesh")
