"""The groups of a layout that shares data alone, which Megatron-core would make too."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from pretrain.config import ParallelSection
from pretrain.parallel import mesh as meshes
from pretrain.parallel.mesh import Axis, build_mesh, needs_parallel_state
from tests.harness import run_ranks

AXES = ("data", "tensor", "context", "pipeline", "replicas", "contributors")


def found(megatron: bool) -> dict[str, Any]:
    """Each axis by the ranks of its group and this one's place there; what the mpu says; the ends."""
    if megatron:
        meshes.needs_parallel_state = lambda parallel: True
    mesh = build_mesh(ParallelSection())
    axes: dict[str, Axis] = {name: getattr(mesh, name) for name in AXES}
    told = {
        name: (dist.get_process_group_ranks(axis.group), axis.rank, axis.size) for name, axis in axes.items()
    }
    kinds = ("data_parallel", "tensor_model_parallel", "model_parallel")
    mpu = {kind: getattr(mesh.mpu, f"get_{kind}_world_size")() for kind in kinds}
    ends = None if mesh.ends is None else dist.get_process_group_ranks(mesh.ends)
    return {"axes": told, "mpu": mpu, "ends": ends}


@pytest.mark.parametrize("ranks", [1, 4])
def test_groups_are_those_of_megatron(ranks: int) -> None:
    assert run_ranks(ranks, found, False) == run_ranks(ranks, found, True)


def test_only_a_layout_that_shares_data_alone_is_made_here() -> None:
    assert not needs_parallel_state(ParallelSection(zero=3))
    for key in ("tensor", "context", "pipeline"):
        assert needs_parallel_state(ParallelSection.model_validate({key: 2}))
    assert needs_parallel_state(ParallelSection(engine="megatron"))
