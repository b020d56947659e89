"""Megatron's gradient buffers and the two ways to step on them: whole on every replica, or sharded (ZeRO 1).

Private fields of megatron-core 0.16.1's DistributedOptimizer are read here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from pretrain.checkpoint.fragments import Fragment, Placement
from pretrain.engine.fragments import create_states, views_of
from pretrain.imports import quick_and_quiet
from pretrain.parallel.without_cuda import replace_cuda_literals, tensor_types_of_cuda

if TYPE_CHECKING:
    from pretrain.parallel.mesh import Mesh


@dataclass(frozen=True)
class Named:
    """A parameter of this rank by its name in the plain model.

    is_copy: another stage has it too and answers for it. is_tied: this stage or that, it is on two.
    """

    name: str
    parameter: nn.Parameter
    placement: Placement
    is_copy: bool
    is_tied: bool


@dataclass(frozen=True)
class Master:
    """What Adam steps of one parameter on this rank: a range of the flattened local tensor from `start` on.

    gradient: its float32 gradient as a view of Megatron's buffer, for good.
    """

    named: Named
    tensor: Tensor
    start: int
    gradient: Tensor


def _master(named: Named, tensor: Tensor, start: int) -> Master:
    gradients: Tensor = named.parameter.main_grad  # type: ignore[attr-defined]
    return Master(named, tensor, start, gradients.view(-1).narrow(0, start, tensor.numel()))


class Updater(Protocol):
    adam: torch.optim.Optimizer
    is_replicated: bool
    """Whether each replica steps everything, and not its own share alone."""

    def masters(self) -> list[Master]: ...

    def step(self) -> None:
        """Step Adam on the gradients as they are in the buffers; then all replicas' weights follow the masters."""
        ...

    def refresh(self) -> None:
        """Bring the model's weights up to date with the masters, on all replicas."""
        ...


class WholeUpdater:
    """ZeRO 0 in float32: the weights are the masters, whole on every rank."""

    is_replicated = True

    def __init__(self, adam: torch.optim.Optimizer, parameters: Sequence[Named]) -> None:
        self.adam = adam
        self._parameters = parameters

    def masters(self) -> list[Master]:
        return [_master(named, named.parameter, 0) for named in self._parameters]

    def step(self) -> None:
        for named in self._parameters:
            named.parameter.grad = named.parameter.main_grad  # type: ignore[attr-defined]
        self.adam.step()
        # Megatron's buffer takes what the next backward pass leaves here; it must not find this step's.
        for named in self._parameters:
            named.parameter.grad = None

    def refresh(self) -> None:
        """Nothing: the weights are the masters."""


class ShardedUpdater:
    """ZeRO 1: Megatron's DistributedOptimizer around our AdamW, whose groups and rates stay ours."""

    is_replicated = False

    def __init__(
        self,
        adam: torch.optim.Optimizer,
        parameters: Sequence[Named],
        chunks: Sequence[Any],
        mesh: Mesh,
        dtype: torch.dtype,
    ) -> None:
        self.adam = adam
        self._parameters = parameters
        self._chunks = chunks
        self._sharded = _distributed_optimizer(adam, chunks, mesh, dtype)

    def masters(self) -> list[Master]:
        groups = self.adam.param_groups
        found = []
        for named in self._parameters:
            place = self._sharded.model_param_group_index_map.get(named.parameter)
            if place is not None:
                group, index = place
                own = self._sharded._get_model_param_range_map(named.parameter)["param"]
                found.append(_master(named, groups[group]["params"][index], own.start))
        return found

    def step(self) -> None:
        self._sharded.prepare_grads()
        self._sharded.step_with_ready_grads()

    def refresh(self) -> None:
        self._sharded._copy_main_params_to_model_params()
        for chunk in self._chunks:
            chunk.start_param_sync(force_sync=True)


def _distributed_optimizer(
    adam: torch.optim.Optimizer, chunks: Sequence[Any], mesh: Mesh, dtype: torch.dtype
) -> Any:
    with quick_and_quiet():
        from megatron.core.optimizer import optimizer as base
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
        from megatron.core.optimizer.optimizer_config import OptimizerConfig
    replace_cuda_literals(base)
    settings = OptimizerConfig(
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        clip_grad=0.0,  # the engine clips, without waiting for the device
    )
    with tensor_types_of_cuda():
        return DistributedOptimizer(
            adam,
            settings,
            grad_scaler=None,
            init_state_fn=None,
            model_chunks=list(chunks),
            per_model_buffers={number: chunk.buffers for number, chunk in enumerate(chunks)},
            data_parallel_group=mesh.replicas.group,
            data_parallel_group_gloo=None,
            data_parallel_group_idx=0,
            distributed_optimizer_instance_id=0,
        )


def megatron_fragments(updater: Updater) -> list[Fragment]:
    """What this rank owns, as views. Adam's states are created where it has not taken a step yet."""
    masters = updater.masters()
    create_states(updater.adam, [master.tensor for master in masters])
    return list(_fragments(updater, masters))


def _fragments(updater: Updater, masters: list[Master]) -> Iterator[Fragment]:
    for master in masters:
        named, flat = master.named, master.tensor.numel()
        yield Fragment(
            named.name,
            tuple(named.parameter.shape),
            master.start,
            views_of(updater.adam, master.tensor, 0, flat),
            updater.adam.state[master.tensor]["step"],
            named.placement,
            is_saved=not named.is_copy,
        )
