"""The run's process groups: made by Megatron-core, named here, and passed on from here."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from pretrain.config import DataSection, ParallelSection

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


def data_parallel_size(parallel: ParallelSection, world: int, global_batch_rows: int) -> int:
    """Ranks that see different rows. Raises ConfigError where the layout does not fit the world or the batch."""
    model_ranks = parallel.tensor * parallel.context * parallel.pipeline
    problems = []
    if world % model_ranks:
        problems.append(
            f"parallel: tensor x context x pipeline = {model_ranks} does not divide the {world} processes; "
            f"start a multiple of {model_ranks}"
        )
    size = max(1, world // model_ranks)
    if parallel.data != "auto" and parallel.data != size:
        problems.append(
            f"parallel.data = {parallel.data}: {world} processes leave {size}; start {parallel.data * model_ranks} "
            "processes or use parallel.data=auto"
        )
    if global_batch_rows % size:
        right = [n for n in range(1, global_batch_rows + 1) if global_batch_rows % n == 0]
        problems.append(
            f"data.global_batch_rows = {global_batch_rows} does not divide by {size} data-parallel ranks; "
            f"use {', '.join(map(str, right[-6:]))} ranks or another batch"
        )
    if problems:
        raise ConfigError("layout error, " + f"{len(problems)} problem(s):\n  " + "\n  ".join(problems))
    return size


def micro_batch_rows(data: DataSection, data_ranks: int) -> int:
    """Rows per forward pass of one rank: what the config says, at most all of the rank's rows."""
    rows = data.global_batch_rows // data_ranks
    if data.micro_batch_rows == "auto":
        return rows
    # The config's divisor of the whole batch may not divide one rank's share: take the largest that does.
    return max(n for n in range(1, min(data.micro_batch_rows, rows) + 1) if rows % n == 0)


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
