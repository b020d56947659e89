"""How long collectives take over the links of a cluster of GPUs.

    seconds = bytes on a rank's link / bandwidth + steps x latency

NCCL joins the ranks of a group in rings, as many as there are ports: each goes through a node's GPUs by NVLink and
leaves it by a port of its own. So all ports of a node whose GPUs take part carry together what the node sends, up to
what NVLink takes in: 32 ranks on four nodes of eight H200s with a 50 GB/s port per GPU measure 369 GB/s
(`benchmarks/published`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.hardware import Accelerator
    from pretrain.plan.constants import Constants


@dataclass(frozen=True)
class Group:
    """Ranks that talk: `ranks` of them, every `stride`-th of the world. Ranks are numbered node by node.

    world: all ranks; 0 where the group's own reach is enough to tell whether it crosses nodes.
    """

    ranks: int
    stride: int = 1
    world: int = 0

    def in_node(self, per_node: int) -> int:
        """How many of them a node holds."""
        if self.stride >= per_node:
            return 1
        return min(self.ranks, max(1, per_node // self.stride))

    def is_within(self, per_node: int) -> bool:
        """Whether none of its groups crosses nodes: groups of 3 in nodes of 8 do, for 8 does not divide by 3."""
        reach = self.ranks * self.stride
        in_one_node = 0 < self.world <= per_node
        return self.ranks == 1 or in_one_node or (reach <= per_node and per_node % reach == 0)


def bandwidth(group: Group, accelerator: Accelerator, constants: Constants) -> float:
    """Bytes per second on each rank's link in a large collective (bus bandwidth, as nccl-tests has it)."""
    per_node = accelerator.gpus_per_node
    node = accelerator.node_gb_s * 1e9 * constants.node_link
    if not accelerator.has_switch:
        # Each pair of GPUs has its share of the links, and a ring over all of them uses each pair once.
        node *= (min(group.ranks, per_node) - 1) / max(1, per_node - 1) if group.ranks > 1 else 1.0
    if group.is_within(per_node):
        return node
    # A node's GPUs that take part each bring their share of its ports.
    ports = accelerator.ports * group.in_node(per_node) / per_node
    network = ports * accelerator.port_gb_s * 1e9 * constants.network_link
    return min(node, network) if group.in_node(per_node) > 1 else network


def seconds(
    kind: str,
    size: float,
    group: Group,
    accelerator: Accelerator,
    constants: Constants,
    *,
    calls: float = 1.0,
) -> float:
    """Of `calls` collectives that move `size` bytes together (the larger side of each).

    kind: "allreduce", a gathering, scattering or exchanging one by any name, or "send" and "recv".
    """
    ranks = group.ranks
    if ranks == 1 or size == 0:
        return 0.0
    point_to_point = kind in ("send", "recv")
    twice = 2 if kind == "allreduce" else 1
    share = 1.0 if point_to_point else (ranks - 1) / ranks
    nodes = (
        1 if group.is_within(accelerator.gpus_per_node) else ranks / group.in_node(accelerator.gpus_per_node)
    )
    within = 1 if point_to_point else twice * (min(ranks, group.in_node(accelerator.gpus_per_node)) - 1)
    # Gathering goes around the ring, node after node; an all-reduce of many nodes up a tree and down again.
    around = 1.0 if point_to_point else twice * math.log2(nodes) if twice == 2 else nodes - 1
    between = 0.0 if nodes == 1 else around
    latency = constants.call_us + within * constants.node_hop_us + between * constants.network_hop_us
    return twice * share * size / bandwidth(group, accelerator, constants) + calls * latency * 1e-6
