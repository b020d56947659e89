"""The Megatron engine: pipeline schedules, gradient buffers and the DistributedOptimizer over our own models."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.checkpoint.fragments import Fragment
from pretrain.config.world import micro_batch_rows
from pretrain.engine.base import Evaluation, StepReport, means, weight_of_step, without_gradients
from pretrain.engine.clip import joint_norm
from pretrain.engine.megatron_optimizer import (
    Named,
    ShardedUpdater,
    Updater,
    WholeUpdater,
    megatron_fragments,
)
from pretrain.engine.optimizer import Bounds, after_step, before_step, optimizer_groups, skip_if_not_finite
from pretrain.engine.stage import Stage, StagedModel
from pretrain.imports import quick_and_quiet, quiet_renamed_collectives
from pretrain.optim import build_optimizer, set_learning_rate
from pretrain.parallel.stages import EMBEDDING
from pretrain.parallel.without_cuda import replace_cuda_literals, stand_in_for_cuda

if TYPE_CHECKING:
    from data_pipelines.stream.batch import Batch
    from pretrain.config import Config
    from pretrain.objectives import LossSum, Objective
    from pretrain.optim.scaling import Scaled
    from pretrain.parallel.mesh import Mesh
    from pretrain.parallel.stages import Part

SHARED = "shared_embedding"
"""Megatron gives a parameter with this attribute a gradient buffer of its own."""
EVALUATED_AT_ONCE = 4
"""Micro-batches per stage that one evaluation schedule takes: enough to keep most stages busy."""


class MegatronEngine:
    """`Engine` on Megatron-core's schedules: none, 1F1B or interleaved, as the layout says.

    Stages hand (B, T, C) on, in our order: Megatron's three sizes only shape the buffers it receives into.
    """

    def __init__(
        self, parts: Sequence[Part], scaled: Scaled, config: Config, mesh: Mesh, device: torch.device
    ) -> None:
        self.scaled = scaled
        self._mesh, self._device = mesh, device
        self._parts, self._sequences = parts, parts[0].sequences
        self._clip_norm = config.optim.clip_norm
        self._micro_rows = micro_batch_rows(config.data, mesh.data.size, config.parallel)
        self._is_last = parts[-1].is_last
        self._interleaved = len(parts) > 1
        self._sequence_ranks = mesh.tensor.size if config.parallel.sequence else 1
        dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
        for part in parts:
            part.model.to(dtype)
        self._chunks, self._schedule = _wrapped(parts, config, mesh, dtype)
        named = named_parameters(parts)
        plain = [(one.name, one.parameter) for one in named]
        adam = build_optimizer(optimizer_groups(plain, parts[0].model.declared, scaled, config), scaled.optim)
        self._updater: Updater = (
            ShardedUpdater(adam, named, self._chunks, mesh, dtype)
            if config.parallel.zero
            else WholeUpdater(adam, named)
        )
        self._masters = self._updater.masters()
        bounds = {name: limit for part in parts for name, limit in part.model.bounds().items()}
        self._bounds = Bounds(self.fragments() if bounds else (), bounds)
        after_step(adam, self._bounds.keep)
        self._staged = StagedModel(parts, mesh.pipeline) if mesh.pipeline.size > 1 else parts[0].model

    # ------------------------------------------------------------------------------------------ training

    def train_step(self, batch: Batch, objective: Objective, lr_factor: float) -> StepReport:
        set_learning_rate(self._updater.adam.param_groups, lr_factor)
        tokens = batch.tokens.numel() * self._mesh.data.size
        batch = self._sequences.part_of(batch).to(self._device, non_blocking=True)
        weight = weight_of_step(batch, objective, self._mesh)
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        # Megatron sums gradients over the replicas (calculate_per_token_loss): what is left is to divide by all tokens.
        scale = 1 / weight.clamp(min=1)
        loss_sum, parts = self._run(batch.split(self._micro_rows), objective, scale)
        for chunk in self._chunks:
            chunk.finish_grad_sync()
        return StepReport(loss_sum, weight, self._update(), tokens, parts)

    @torch.no_grad()
    def _update(self) -> Tensor:
        """Clip and step; returns () the global norm before clipping."""
        for master in self._masters:
            if master.named.is_tied:
                # Each end has the gradient of its own use. Both cut it alike: it has a buffer of its own.
                dist.all_reduce(master.gradient, group=self._mesh.ends)
        norm = self._gradient_norm()
        if self._clip_norm is not None and self._masters:
            factor = (self._clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([master.gradient for master in self._masters], factor)
        skip_if_not_finite(self._updater.adam, norm)
        self._updater.step()
        return norm

    def _gradient_norm(self) -> Tensor:
        """() the L2 norm over all stages, tensor ranks and shards, each parameter counted once."""
        counted = [
            master.gradient
            for master in self._masters
            if not master.named.is_copy
            and (master.named.placement.dim is not None or self._mesh.tensor.rank == 0)
        ]
        square = torch.zeros((), device=self._device)
        if counted:
            square = joint_norm(counted).square()
        dist.all_reduce(square)
        return (square / (self._mesh.replicas.size if self._updater.is_replicated else 1)).sqrt()

    def _run(
        self, micro_batches: list[Batch], objective: Objective, scale: Tensor | float, *, train: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Forward and, to train, backward through all stages. Returns () the loss and (P, 2) its parts, summed over
        the micro-batches: zeros on all ranks but the last stage's. The micro-batches have equal shapes."""
        sums = _Sums(objective, len(micro_batches), self._device)
        # The interleaved schedule takes multiples of the stages only: what is added is not counted.
        added = -len(micro_batches) % self._mesh.pipeline.size if self._interleaved else 0
        assert not (added and train), "the layout was checked for this"
        run = [*micro_batches, *micro_batches[-1:] * added]

        def forward(batches: Iterator[Batch], stage: nn.Module) -> tuple[Any, Callable[..., Any]]:
            return stage(next(batches), objective), account

        def account(loss: LossSum) -> tuple[Tensor, Tensor, None]:
            sums.add(loss)
            tokens = torch.zeros((), dtype=torch.int)  # Megatron's count; ours is in the scale
            return loss.total * scale, tokens, None

        iterators = [iter(run) for _ in self._chunks]
        rows, time = run[0].tokens.shape
        self._schedule(
            forward_step_func=forward,
            data_iterator=iterators if self._interleaved else iterators[0],
            model=self._chunks if self._interleaved else self._chunks[0],
            num_microbatches=len(run),
            # Megatron receives (seq_length / context, micro_batch_size, width), and that shall be our (B, T, C).
            seq_length=rows * self._mesh.context.size,
            micro_batch_size=time // (self._sequence_ranks if train else 1),
            forward_only=not train,
        )
        return sums.loss, sums.parts

    # --------------------------------------------------------------------------------------- evaluation

    def evaluate(self, batches: Iterable[Batch], objective: Objective) -> Evaluation:
        sums = torch.zeros((1 + len(objective.parts), 2), dtype=torch.float64, device=self._device)
        with without_gradients(self._chunks):
            for group in self._groups(batches):
                loss, parts = self._run(group, objective, 1.0, train=False)
                sums[0, 0] += loss
                sums[1:] += parts
                if self._is_last:
                    sums[0, 1] += sum(objective.weight(batch) for batch in group)
        dist.all_reduce(sums, group=self._mesh.contributors.group)
        loss_sum, weight = sums[0].tolist()
        return Evaluation(loss_sum, weight, means(objective.parts, sums[1:]))

    def _groups(self, batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """Neighbours of equal shape, as many as a schedule can take; on the device."""
        size = self._mesh.pipeline.size
        for _, alike in itertools.groupby(batches, key=lambda batch: batch.tokens.shape):
            waiting = (self._sequences.part_of(batch).to(self._device) for batch in alike)
            while group := list(itertools.islice(waiting, EVALUATED_AT_ONCE * size)):
                yield group

    @contextlib.contextmanager
    def inference(self) -> Iterator[nn.Module]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(without_gradients(self._chunks))
            for part in self._parts:
                stack.enter_context(part.sequences.whole_rows())
            yield self._staged

    # -------------------------------------------------------------------------------------------- state

    def fragments(self) -> list[Fragment]:
        return megatron_fragments(self._updater)

    def before_update(self, callback: Callable[[], object]) -> None:
        before_step(self._updater.adam, callback)

    def after_load(self) -> None:
        self._bounds.keep()  # they may be narrower than those the checkpoint was trained with
        self._updater.refresh()


class _Sums:
    """Losses of the first `count` micro-batches, which the last stage meets in their order."""

    def __init__(self, objective: Objective, count: int, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)
        self.parts = torch.zeros((len(objective.parts), 2), dtype=torch.float64, device=device)
        self._left = count

    def add(self, loss: LossSum) -> None:
        if self._left:
            self.loss += loss.loss
            self.parts += loss.parts
            self._left -= 1


def named_parameters(parts: Sequence[Part]) -> list[Named]:
    """All of this rank's, in the order of the blocks."""
    return [
        Named(
            part.names[local],
            parameter,
            part.placements[part.names[local]],
            is_copy=part.names[local] in part.copies,
            is_tied=getattr(parameter, SHARED, False),
        )
        for part in parts
        for local, parameter in part.model.named_parameters()
    ]


def _wrapped(
    parts: Sequence[Part], config: Config, mesh: Mesh, dtype: torch.dtype
) -> tuple[list[Any], Callable[..., Any]]:
    """Each part in Megatron's DistributedDataParallel, and the schedule that drives them."""
    with quick_and_quiet():
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.enums import ModelType
        from megatron.core.pipeline_parallel import schedules
        from megatron.core.transformer import multi_token_prediction  # noqa: F401  # the schedules' own late import
    quiet_renamed_collectives()
    stand_in_for_cuda()
    replace_cuda_literals(schedules)
    settings = _settings(config, mesh, dtype)
    buffers = DistributedDataParallelConfig(
        use_distributed_optimizer=config.parallel.zero > 0,
        grad_reduce_in_fp32=True,  # micro-batches and replicas add up in float32, whatever the weights are
        overlap_grad_reduce=False,
    )
    tied = bool(getattr(config.model, "tied_head", False)) and mesh.pipeline.size > 1
    for part in parts:
        for local, parameter in part.model.named_parameters():
            if tied and part.names[local] == EMBEDDING:
                setattr(parameter, SHARED, True)
    stages = [Stage(part, ModelType.encoder_or_decoder) for part in parts]
    chunks = [DistributedDataParallel(settings, buffers, stage) for stage in stages]
    return chunks, schedules.get_forward_backward_func()


def _settings(config: Config, mesh: Mesh, dtype: torch.dtype) -> Any:
    """What the schedules read. Of the model they need the width alone."""
    with quick_and_quiet():
        from megatron.core.transformer.transformer_config import TransformerConfig
    interleaved = config.parallel.pipeline_chunks > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated settings that are Megatron's own defaults
        return TransformerConfig(
            num_layers=config.model.layers,
            hidden_size=config.model.width,
            num_attention_heads=mesh.tensor.size,  # asked for, and not looked at
            tensor_model_parallel_size=mesh.tensor.size,
            context_parallel_size=mesh.context.size,
            pipeline_model_parallel_size=mesh.pipeline.size,
            virtual_pipeline_model_parallel_size=config.parallel.pipeline_chunks if interleaved else None,
            pipeline_dtype=dtype,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            calculate_per_token_loss=True,
            # Interleaved stages send and receive more than once per pair and batch. Batched, the messages are taken for
            # each other, and the losses are wrong without an error.
            overlap_p2p_comm=interleaved,
            batch_p2p_comm=not interleaved,
            batch_p2p_sync=False,  # a wait for the device that only torch before 1.13 needed
        )
