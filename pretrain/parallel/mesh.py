"""The run's process groups, named here and passed on from here. Megatron-core makes those of layouts that share more
than the data."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import torch.distributed as dist

from pretrain.imports import quick_and_quiet

if TYPE_CHECKING:
    from pretrain.config import ParallelSection


TIMEOUT = timedelta(minutes=30)
"""Of collectives; as Megatron's groups have it. torch's own default is shorter on GPUs."""


@dataclass(frozen=True)
class Axis:
    """One direction of the layout: this rank's group along it, its place there and the group's size."""

    group: dist.ProcessGroup
    rank: int
    size: int

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1


@dataclass(frozen=True)
class Mesh:
    data: Axis
    """Ranks that read different rows."""
    tensor: Axis
    """Ranks that share layers."""
    context: Axis
    """Ranks that share rows, each with some of their positions."""
    pipeline: Axis
    """Ranks that share the blocks."""
    replicas: Axis
    """data x context: ranks with the same weights, over which gradients are summed and ZeRO shards."""
    contributors: Axis
    """data x context x pipeline: ranks whose sums of the loss add up to the step's. Ranks of one tensor group have
    equal sums, and all stages but the last have zeros."""
    ends: dist.ProcessGroup | None
    """The first and the last stage, which both hold a tied embedding; None on the others."""
    control: dist.ProcessGroup
    """All ranks, over gloo: agreements between hosts that must not wait for a GPU."""
    storage: dist.ProcessGroup
    """All ranks, over gloo, for the checkpoint writer's thread alone."""
    mpu: SimpleNamespace
    """Megatron's groups under the names DeepSpeed asks for."""

    @property
    def is_main(self) -> bool:
        return dist.get_rank() == 0


def import_parallel_state() -> ModuleType:
    """megatron.core.parallel_state."""
    with quick_and_quiet():
        from megatron.core import parallel_state
    return parallel_state


def build_mesh(parallel: ParallelSection, host_backend: str = "gloo") -> Mesh:
    """Make every process group. Needs torch.distributed; collective over all ranks.

    host_backend: of the groups for agreements between hosts.
    """
    if not needs_parallel_state(parallel):
        return _data_parallel_mesh(host_backend)
    parallel_state = import_parallel_state()
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.pipeline_chunks
            if parallel.pipeline_chunks > 1
            else None,
            context_parallel_size=parallel.context,
            create_gloo_process_groups=False,
        )
    tensor = _axis(parallel_state.get_tensor_model_parallel_group())
    assert tensor.size == parallel.tensor, "this process has Megatron's groups of another layout"
    replicas = _axis(parallel_state.get_data_parallel_group(with_context_parallel=True))
    return Mesh(
        data=_axis(parallel_state.get_data_parallel_group()),
        tensor=tensor,
        context=_axis(parallel_state.get_context_parallel_group()),
        pipeline=_axis(parallel_state.get_pipeline_model_parallel_group()),
        replicas=replicas,
        contributors=_contributors(parallel, tensor, replicas),
        ends=parallel_state.get_embedding_group(check_initialized=False),
        control=dist.new_group(backend=host_backend),
        storage=dist.new_group(backend=host_backend),
        mpu=_mpu(tensor, replicas),
    )


def needs_parallel_state(parallel: ParallelSection) -> bool:
    """Whether Megatron's groups are needed, and Megatron, which takes a second to import, with them."""
    alone = parallel.tensor == parallel.context == parallel.pipeline == 1
    return not alone or parallel.chosen_engine == "megatron"


def _data_parallel_mesh(host_backend: str) -> Mesh:
    """Every rank has a whole model, and reads rows of its own."""
    data = _axis(dist.new_group(timeout=TIMEOUT))
    alone = _axis(dist.new_group([dist.get_rank()], timeout=TIMEOUT, use_local_synchronization=True))
    return Mesh(
        data=data,
        tensor=alone,
        context=alone,
        pipeline=alone,
        replicas=data,
        contributors=data,
        ends=alone.group,
        control=dist.new_group(backend=host_backend),
        storage=dist.new_group(backend=host_backend),
        mpu=_mpu(alone, data),
    )


def _contributors(parallel: ParallelSection, tensor: Axis, replicas: Axis) -> Axis:
    if parallel.pipeline == 1:
        return replicas
    # Megatron numbers the ranks of a tensor group one after the other.
    world = dist.get_world_size()
    groups = [dist.new_group(list(range(first, world, tensor.size))) for first in range(tensor.size)]
    return _axis(groups[tensor.rank])


def _mpu(tensor: Axis, replicas: Axis) -> SimpleNamespace:
    """What DeepSpeed asks an mpu for. Its word for ranks with the same weights is data parallel, and for all that
    hold one replica together, model parallel: here the tensor axis."""
    axes = {"data_parallel": replicas, "tensor_model_parallel": tensor, "model_parallel": tensor}
    functions: dict[str, object] = {}
    for name, axis in axes.items():
        functions |= {
            f"get_{name}_group": lambda axis=axis: axis.group,
            f"get_{name}_rank": lambda axis=axis: axis.rank,
            f"get_{name}_world_size": lambda axis=axis: axis.size,
        }
    return SimpleNamespace(**functions)


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(group, dist.get_rank(group), dist.get_world_size(group))
