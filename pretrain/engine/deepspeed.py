"""The DeepSpeed engine: ZeRO 0-3 over a model that Megatron's groups may have split."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.checkpoint.fragments import Fragment
from pretrain.config.world import micro_batch_rows
from pretrain.engine.base import Evaluation, StepReport, means, weight_of_step, without_gradients
from pretrain.engine.buckets import bucket_elements, small_parameter
from pretrain.engine.clip import clip_by_global_norm
from pretrain.engine.fragments import (
    after_adam_step,
    before_adam_step,
    deepspeed_fragments,
    refresh_weights,
)
from pretrain.engine.optimizer import Bounds, optimizer_groups, skip_if_not_finite
from pretrain.imports import quiet_renamed_collectives, without_compiling
from pretrain.optim import UncompiledAdamW, build_optimizer, set_learning_rate
from pretrain.optim.scaling import resolve
from pretrain.parallel.nodes import share_within_node

if TYPE_CHECKING:
    from data_pipelines.stream.batch import Batch
    from pretrain.config import Config
    from pretrain.objectives import Objective
    from pretrain.parallel.mesh import Mesh
    from pretrain.parallel.parallelize import Parallelized

NO_PRINTING = 1 << 40


class LossModule(nn.Module):
    """Model and objective in one forward pass: DeepSpeed's hooks need the loss to come out of its module."""

    PREFIX = "model."

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
        loss = objective(self.model, batch)
        return loss.total, loss.loss, loss.parts


class DeepSpeedEngine:
    """`Engine` on deepspeed.initialize with torch's AdamW as the client optimizer."""

    def __init__(self, parallelized: Parallelized, config: Config, mesh: Mesh, device: torch.device) -> None:
        deepspeed = import_deepspeed(device)
        self._mesh = mesh
        self._device = device
        self._placements = parallelized.placements
        self._sequences = parallelized.sequences
        module = LossModule(parallelized.model)
        self.scaled = resolve(config, parallelized.model)
        groups = optimizer_groups(
            parallelized.model.named_parameters(), parallelized.model.declared, self.scaled, config
        )
        rows = config.data.global_batch_rows // mesh.data.size
        parameters = sum(parameter.numel() for parameter in module.parameters())
        self._micro_rows = micro_batch_rows(config.data, mesh.data.size, config.parallel)
        self._clip_norm = config.optim.clip_norm
        self._clips_itself = config.parallel.zero > 0
        in_node = share_within_node(mesh) if config.parallel.zero_group == "node" else 1
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(groups, self.scaled.optim),
            config=deepspeed_config(config, parameters, self._micro_rows, rows // self._micro_rows, in_node),
            mpu=mesh.mpu,
            dist_init_required=False,
        )
        bounds = parallelized.model.bounds()
        self._bounds = Bounds(self.fragments() if bounds else (), bounds)
        if bounds:
            after_adam_step(self._engine, self._bounds.keep)

    # ------------------------------------------------------------------------------------------ training

    def train_step(self, batch: Batch, objective: Objective, lr_factor: float) -> StepReport:
        set_learning_rate(self._optimizer.param_groups, lr_factor)
        tokens = batch.tokens.numel() * self._mesh.data.size
        batch = self._sequences.part_of(batch).to(self._device, non_blocking=True)
        weight = weight_of_step(batch, objective, self._mesh)
        # DeepSpeed averages gradients over the replicas; the sum over all tokens is what we divide. A step without a
        # single target has no gradient, and must not have NaN.
        scale = self._mesh.replicas.size / weight.clamp(min=1)
        loss_sum = torch.zeros((), device=self._device)
        part_sums = self._no_parts(objective)
        gradient_norm = None
        micro_batches = batch.split(self._micro_rows)
        for number, micro_batch in enumerate(micro_batches):
            total, loss, parts = self._engine(micro_batch, objective)
            self._engine.backward(total * scale, scale_wrt_gas=False)
            loss_sum += loss
            part_sums += parts
            if number == len(micro_batches) - 1 and not self._clips_itself:
                gradient_norm = clip_by_global_norm(
                    self._engine.module.parameters(), self._clip_norm, self._mesh.tensor
                )
                skip_if_not_finite(self._optimizer, gradient_norm)
            self._engine.step()
        if gradient_norm is None:
            gradient_norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=self._device)
        return StepReport(loss_sum, weight, gradient_norm, tokens, part_sums)

    def _no_parts(self, objective: Objective) -> Tensor:
        return torch.zeros((len(objective.parts), 2), dtype=torch.float64, device=self._device)

    # --------------------------------------------------------------------------------------- evaluation

    def evaluate(self, batches: Iterable[Batch], objective: Objective) -> Evaluation:
        weight = torch.zeros((), dtype=torch.float64, device=self._device)
        # The first row is the loss.
        sums = torch.zeros((1 + len(objective.parts), 2), dtype=torch.float64, device=self._device)
        with without_gradients((self._engine,)):
            for batch in batches:
                on_device = self._sequences.part_of(batch).to(self._device)
                _, loss, parts = self._engine.module(on_device, objective)
                sums[0, 0] += loss
                sums[1:] += parts
                weight += objective.weight(on_device)
        dist.all_reduce(sums, group=self._mesh.contributors.group)
        dist.all_reduce(weight, group=self._mesh.replicas.group)
        return Evaluation(sums[0, 0].item(), weight.item(), means(objective.parts, sums[1:]))

    @contextlib.contextmanager
    def inference(self) -> Iterator[nn.Module]:
        with without_gradients((self._engine,)), self._sequences.whole_rows():
            yield self._engine.module.model

    # -------------------------------------------------------------------------------------------- state

    def fragments(self) -> list[Fragment]:
        return deepspeed_fragments(self._engine, self._placements, prefix=LossModule.PREFIX)

    def before_update(self, callback: Callable[[], object]) -> None:
        before_adam_step(self._engine, callback)

    def after_load(self) -> None:
        self._bounds.keep()  # they may be narrower than those the checkpoint was trained with
        refresh_weights(self._engine)


def deepspeed_config(
    config: Config, parameters: int, micro_rows: int, accumulation: int, in_node: int = 1
) -> dict[str, Any]:
    """in_node: replicas of a node that share a second copy of the parameters; 1 for no such copy."""
    bucket = bucket_elements(parameters)
    zero: dict[str, Any] = {
        "stage": config.parallel.zero,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if config.parallel.zero == 3:
        zero |= {"stage3_param_persistence_threshold": small_parameter(config.model.width)}
        zero |= {"zero_hpz_partition_size": in_node}
    if config.parallel.offload == "optimizer":
        zero |= {"offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}}
    return {
        "train_micro_batch_size_per_gpu": micro_rows,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": zero,
        # A step whose gradient is not finite is left out, as in float32.
        "bf16": {"enabled": config.precision.dtype == "bf16", "check_grad_overflow": True},
        "gradient_clipping": config.optim.clip_norm
        if config.parallel.zero and config.optim.clip_norm
        else 0.0,
        "zero_allow_untested_optimizer": True,
        # With offload too the optimizer is torch's; DeepSpeed's own for the CPU compiles for minutes.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NO_PRINTING,
        "wall_clock_breakdown": False,
    }


def import_deepspeed(device: torch.device) -> Any:
    """deepspeed, quiet, and without its shared-memory extension.

    That extension is compiled at the first use on a CPU (a minute and a half) for one inference collective.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    quiet_renamed_collectives()
    with without_compiling():
        import deepspeed
        import deepspeed.runtime.zero.muon.muon_optimizer  # every optimizer looks for this one, and it compiles
        from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if UncompiledAdamW not in ZERO_SUPPORTED_OPTIMIZERS:  # it is torch's AdamW, which is
        ZERO_SUPPORTED_OPTIMIZERS.append(UncompiledAdamW)

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # `deepspeed.comm.torch` as an attribute is torch itself; the module is found by its name only.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed
