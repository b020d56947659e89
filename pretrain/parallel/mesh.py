"""The run's process groups: made by Megatron-core, named here, and passed on from here."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from pretrain.config import ParallelSection

MPU_NAMES = (
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_tensor_model_parallel_group",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
)


@dataclass(frozen=True)
class Axis:
    """One direction of the layout: this rank's group along it, its place there and the group's size."""

    group: dist.ProcessGroup
    rank: int
    size: int


@dataclass(frozen=True)
class Mesh:
    data: Axis
    tensor: Axis
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
    """megatron.core.parallel_state, quiet and, on a machine without CUDA, quick.

    The package wraps functions in torch.compile as it is imported, and the first such call imports the whole of
    Inductor: two of a CPU's seconds in every rank of every start, for functions that CPUs never run compiled.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Megatron warns once per optional library that is not installed; none of them is used here.
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            stack.callback(setattr, torch, "compile", torch.compile)
            torch.compile = lambda function: function  # type: ignore[assignment]
        from megatron.core import parallel_state
    return parallel_state


def build_mesh(parallel: ParallelSection) -> Mesh:
    """Make every process group. Needs torch.distributed; collective over all ranks."""
    parallel_state = import_parallel_state()
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            context_parallel_size=parallel.context,
        )
    mpu = SimpleNamespace(**{name: getattr(parallel_state, name) for name in MPU_NAMES})
    # DeepSpeed's word for everything that holds one replica of the model together: here the tensor axis.
    mpu.get_model_parallel_group = mpu.get_tensor_model_parallel_group
    mpu.get_model_parallel_rank = mpu.get_tensor_model_parallel_rank
    mpu.get_model_parallel_world_size = mpu.get_tensor_model_parallel_world_size
    return Mesh(
        data=_axis(parallel_state.get_data_parallel_group()),
        tensor=_axis(parallel_state.get_tensor_model_parallel_group()),
        control=dist.new_group(backend="gloo"),
        storage=dist.new_group(backend="gloo"),
        mpu=mpu,
    )


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(group, dist.get_rank(group), dist.get_world_size(group))
