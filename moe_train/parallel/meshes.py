"""The processes of a run as meshes: one for the experts, one for all else.

    all else   (replicate, shard)                  shard: who has the other rows of a weight
    experts    (replicate, expert, expert_shard)   expert: who has other experts; expert_shard: the rest of one's own

`replicate` are those that hold the same and sum their gradients. Ranks run fastest along `shard` and along `expert`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from moe_train.cost.layout import Layout


class Meshes(NamedTuple):
    rest: DeviceMesh
    experts: DeviceMesh


def build_meshes(layout: Layout, device_type: str) -> Meshes:
    """A collective call: all processes make it."""
    ranks = torch.arange(layout.num_devices)
    rest = DeviceMesh(device_type, ranks.view(-1, layout.shard), mesh_dim_names=("replicate", "shard"))
    cut = max(1, layout.shard // layout.expert_parallel)
    by_expert = ranks.view(-1, cut, layout.expert_parallel).transpose(1, 2).contiguous()
    return Meshes(rest, DeviceMesh(device_type, by_expert, mesh_dim_names=("replicate", "expert", "expert_shard")))
