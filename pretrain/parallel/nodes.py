"""Replicas on one node, which share a second copy of ZeRO 3's parameters (ZeRO++'s hpZ, arXiv:2306.10209)."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist

from pretrain.errors import UserError

if TYPE_CHECKING:
    from pretrain.parallel.mesh import Mesh


LONE_REPLICAS = (
    "parallel.zero_group = node: each node holds one replica of the model, so a node's copy would be the whole "
    "model on every rank; use parallel.zero=2, or parallel.zero_group=all"
)


def share_within_node(mesh: Mesh) -> int:
    """Make the groups and tell DeepSpeed of this rank's. Returns the replicas per node; collective over all ranks.

    Raises UserError where the nodes hold unequal numbers of replicas, or one each.
    """
    from deepspeed.utils import groups

    here = (node_name(), tuple(dist.get_process_group_ranks(mesh.replicas.group)))
    told: list[tuple[str, tuple[int, ...]]] = [here] * dist.get_world_size()
    dist.all_gather_object(told, here, group=mesh.control)
    members = replicas_by_node(told)
    size = len(members[0])
    for ranks in members:  # every rank makes every group
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            # DeepSpeed's own way to make it takes neighbours of the whole world, other ranks' layers among them.
            groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = group
    return size


def replicas_by_node(told: Sequence[tuple[str, tuple[int, ...]]]) -> list[list[int]]:
    """From each rank's node and its replicas: the ranks that are replicas of each other on one node."""
    members: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for rank, place in enumerate(told):
        members.setdefault(place, []).append(rank)
    sizes = sorted({len(ranks) for ranks in members.values()})
    if len(sizes) > 1:
        raise UserError(
            f"parallel.zero_group = node: some nodes hold {sizes[0]} replicas of the model and some {sizes[-1]}; "
            "start as many processes on each node, or use parallel.zero_group=all"
        )
    if sizes == [1]:
        raise UserError(LONE_REPLICAS)
    return list(members.values())


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """Slurm's name of this node, or the host's."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()
