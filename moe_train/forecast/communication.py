"""Seconds that devices need to exchange data: tokens to experts and back, shards, replicas.

A device sends through its link inside the node and through a network card of its own. A collective that spans nodes
goes round in as many rings as the group has devices in a node, each over another card, and all of them over the links
inside the node (as NCCL does): its speed is the lesser of the two.

With node-limited routing (arXiv 2412.19437, section 2.1.2) a token crosses to a node once, however many experts it
visits there, and is passed on inside. Dispatch goes out in FP8 with an FP32 scale for every 128 numbers, combine comes
back in BF16; the backward pass does the same with gradients (section 3.3.3). Experts are taken to be loaded evenly.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config import LinksConfig, MoEConfig
from moe_train.forecast.rates import BETWEEN_NODES_SHARE, IN_NODE_SHARE

GB = 1e9


@dataclass(frozen=True)
class Exchange:
    """Seconds of one token and layer in one direction of the pass."""

    dispatch: float
    combine: float

    @property
    def seconds(self) -> float:
        return self.dispatch + self.combine


@dataclass(frozen=True)
class Network:
    """Links at the speed that was measured on them, in bytes a second and device, one way."""

    devices_per_node: int
    in_node: float
    between_nodes: float

    @classmethod
    def of(cls, links: LinksConfig) -> Network:
        return cls(
            links.devices_per_node,
            links.in_node_gb_s * GB * IN_NODE_SHARE,
            links.between_nodes_gb_s * GB * BETWEEN_NODES_SHARE,
        )

    def members_in_a_node(self, members: int, apart: int) -> int:
        """Of a group of `members` devices, each `apart` from the next."""
        return max(1, min(members, self.devices_per_node // apart))

    def collective_speed(self, members: int, apart: int = 1) -> float:
        """Bytes a second that each device of the group sends."""
        here = self.members_in_a_node(members, apart)
        if here == members:
            return self.in_node
        return self.between_nodes if here == 1 else min(self.in_node, here * self.between_nodes)

    def gather_seconds(self, size: float, members: int, apart: int = 1) -> float:
        """All-gather to, or reduce-scatter of, `size` bytes on every device. An all-reduce is both, so twice."""
        return (members - 1) / members * size / self.collective_speed(members, apart)

    def exchange(self, hidden: int, moe: MoEConfig, expert_parallel: int, dispatch_bytes: float) -> Exchange:
        """All-to-all of one token of width `hidden`, with `dispatch_bytes` for each of its numbers on the way out."""
        if expert_parallel == 1:
            return Exchange(0.0, 0.0)
        nodes = -(-expert_parallel // self.devices_per_node)
        crossing = 0.0 if nodes == 1 else nodes_visited(moe, nodes)
        devices = devices_visited(moe, expert_parallel)
        slowest = max(crossing / self.between_nodes, devices / self.in_node)  # seconds a byte
        return Exchange(hidden * dispatch_bytes * slowest, hidden * 2.0 * slowest)


def distinct(choices: float, places: int) -> float:
    """Of `places`, how many are hit by so many even choices, on average."""
    missed: float = (1 - 1 / places) ** choices
    return places * (1 - missed)


def nodes_visited(moe: MoEConfig, nodes: int) -> float:
    """By a token on average, its own counted as the measured bandwidths count it. Routing is limited to `topk_group`
    nodes where each node holds one group of experts."""
    free = distinct(moe.experts_per_token, nodes)
    return min(free, moe.topk_group) if moe.n_group == nodes else free


def devices_visited(moe: MoEConfig, expert_parallel: int) -> float:
    """By a token on average. Routing reaches `topk_group` groups of experts, each of which lies on whole devices."""
    within = expert_parallel % moe.n_group == 0
    reached = expert_parallel // moe.n_group * moe.topk_group if within else expert_parallel
    return distinct(moe.experts_per_token, reached)


def dispatch_bytes(fp8: bool) -> float:
    """A number on its way to an expert: FP8 with its share of a scale, or BF16."""
    return 1 + 4 / 128 if fp8 else 2.0
