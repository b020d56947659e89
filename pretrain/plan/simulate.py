"""One rank's forward and backward pass of one micro-batch, run for real on tensors without storage.

The layout is built by the code that training uses, over a process group that sends nothing; what the passes hold and
send is counted by `pretrain.plan.tracker`, which counts the same on real tensors. No formula stands in for the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from data_pipelines.batch import Batch, Corruption, Cursor
from data_pipelines.vocabulary import SPECIALS, Modality, Vocabulary
from models import families
from pretrain.config_objective import MaskedDiffusionSection
from pretrain.objectives import Objective, build_objective
from pretrain.parallel.mesh import Mesh, build_mesh, import_parallel_state
from pretrain.parallel.parallelize import Parallelized, parallelize
from pretrain.plan.tracker import TensorTracker, Traffic

if TYPE_CHECKING:
    from pretrain.config import Config, ParallelSection

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MASKED_SHARE = 0.5
"""Of the tokens, those that a denoising model has to predict: the mean of the linear schedule."""


@dataclass(frozen=True)
class Passes:
    """Bytes on one rank, for one micro-batch; parameters, gradients and the batch itself are not counted.

    kept: held between the forward and the backward pass.
    body: the most held at any time, if nothing came after the last block and norm.
    peak: the most held at any time.
    traffic: what went through collectives, by axis and kind.
    parameters: elements of this rank's parameters.
    """

    kept: int
    body: int
    peak: int
    traffic: Traffic
    parameters: int

    @property
    def logits(self) -> int:
        """What the head and the loss add to the peak."""
        return max(0, self.peak - self.body)


@contextlib.contextmanager
def pretended_mesh(parallel: ParallelSection, world: int, rank: int = 0) -> Iterator[Mesh]:
    """The mesh of a rank among `world`, over process groups that send nothing. Needs torch.distributed unused."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a plan is made outside of a run"
    parallel_state = import_parallel_state()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield build_mesh(parallel, host_backend="fake")
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def simulate(config: Config, model_config: Any, mesh: Mesh, rows: int) -> Passes:
    """The passes of a micro-batch of `rows` rows under the config's layout, on this rank of the mesh."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        parallelized = _built(config, model_config, mesh)
        model = parallelized.model
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        batch = pretended_batch(config, model_config, rows)
        objective = pretended_objective(config, model_config)
        body = _tracked(mesh, lambda: _body(model, objective, batch))
        whole = _tracked(mesh, lambda: objective(model, batch).total)
        return Passes(
            kept=whole.kept,
            body=body.tracker.peak,
            peak=whole.tracker.peak,
            traffic=whole.tracker.traffic,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
        )


@dataclass(frozen=True)
class _Tracked:
    kept: int
    tracker: TensorTracker


def _tracked(mesh: Mesh, forward: Callable[[], Tensor]) -> _Tracked:
    with TensorTracker(_axis_names(mesh)) as tracker:
        loss = forward()
        kept = tracker.live
        loss.backward()
    return _Tracked(kept, tracker)


def _axis_names(mesh: Mesh) -> Callable[[dist.ProcessGroup], str]:
    names = {
        axis: getattr(mesh, axis).group.group_name for axis in ("tensor", "context", "pipeline", "replicas")
    }
    by_group = {name: axis for axis, name in reversed(names.items())}
    return lambda group: by_group.get(group.group_name, "other")


def _built(config: Config, model_config: Any, mesh: Mesh) -> Parallelized:
    family = families[config.model.family]
    # Built in the dtype it is trained in: tensors without storage cannot be cast in place.
    with torch.device("meta"), _default_dtype(DTYPES[config.precision.dtype]):
        model = family.build(model_config)
    return parallelize(
        model, family.sharding, mesh, config.parallel, device=torch.device("cpu"), seed=config.run.seed
    )


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def _body(model: nn.Module, objective: Objective, batch: Batch) -> Tensor:
    inputs = batch.tokens if batch.corruption is None else batch.corruption.inputs
    hidden_BTC: Tensor = model(inputs, batch.segment_ids, batch.positions)
    return hidden_BTC.sum()


def pretended_objective(config: Config, model_config: Any) -> Objective:
    """The config's objective, on a vocabulary of the planned size."""
    if not isinstance(config.objective, MaskedDiffusionSection):
        return build_objective(config)
    size = model_config.vocabulary - len(SPECIALS)
    return build_objective(config, Vocabulary(Modality("text", 0, size, "planned"), eot=0))


def pretended_batch(config: Config, model_config: Any, rows: int) -> Batch:
    """Rows of one document each, without segment ids: which documents there are changes no size."""
    length = config.data.sequence_length
    axes = getattr(model_config, "position_axes", 1)
    positions = torch.zeros((rows, length) if axes == 1 else (rows, length, axes), dtype=torch.int16)
    tokens = torch.zeros((rows, length + 1), dtype=torch.int64)
    corruption = None
    if isinstance(config.objective, MaskedDiffusionSection):
        corruption = _pretended_corruption(rows, length)
    return Batch(
        sequences=tokens,
        weights=torch.ones((rows, length), dtype=torch.bool),
        segment_ids=None,  # type: ignore[arg-type]  # the model takes None for rows of one document
        positions=positions,
        rows=torch.arange(rows),
        cursor=Cursor(rows, "planned"),
        corruption=corruption,
    )


def _pretended_corruption(rows: int, length: int) -> Corruption:
    from pretrain.objectives.corruption import PARTS

    each = int(MASKED_SHARE * length)
    count = rows * each
    return Corruption(
        inputs=torch.zeros((rows, length), dtype=torch.int64),
        places=torch.zeros(count, dtype=torch.int64),
        weights=torch.ones(count),
        elbo_weights=torch.ones(count),
        parts=torch.zeros((count, 3), dtype=torch.uint8),
        targets=torch.zeros(rows, dtype=torch.int32),
        part_targets=torch.zeros((rows, len(PARTS)), dtype=torch.int32),
        row_places=(each,) * rows,
    )
