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
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from data_pipelines.stream.batch import Batch, Cursor
from data_pipelines.tokens.vocabulary import SPECIALS, Modality, Vocabulary
from kernels.newton_rnn import Solver, newton
from kernels.newton_rnn import split as newton_split
from kernels.sigmoid_attention import op as sigmoid_op
from models.pararnn import cells
from models.softmax.mixer import SoftmaxAttention
from pretrain.engine.buckets import small_parameter
from pretrain.engine.stage import Continued
from pretrain.imports import quiet_renamed_collectives
from pretrain.objectives import Objective, build_objective
from pretrain.parallel.mesh import Mesh, build_mesh, import_parallel_state, needs_parallel_state
from pretrain.parallel.stages import Part, build_parts
from pretrain.plan.tracker import TensorTracker, Traffic

if TYPE_CHECKING:
    from pretrain.config import Config, ParallelSection

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALIGNMENT = 64


@dataclass(frozen=True)
class Passes:
    """Bytes on one rank, for one micro-batch; parameters, gradients and the batch itself are not counted.

    kept: held between the forward and the backward pass.
    body: the most held at any time, if nothing came after the last block and norm.
    peak: the most held at any time.
    traffic: what went through collectives, by axis and kind. calls: how many of them.
    parameters: elements of this rank's parameters.
    aligned: the same as Megatron lays them out, each on a multiple of 64.
    small: those of parameters so small that DeepSpeed keeps them whole under ZeRO 3.
    """

    kept: int
    body: int
    peak: int
    traffic: Traffic
    calls: Traffic
    parameters: int
    aligned: int
    small: int

    @property
    def logits(self) -> int:
        """What the head and the loss add to the peak."""
        return max(0, self.peak - self.body)


@contextlib.contextmanager
def pretended_mesh(parallel: ParallelSection, world: int, rank: int = 0) -> Iterator[Mesh]:
    """The mesh of a rank among `world`, over process groups that send nothing. Needs torch.distributed unused."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a plan is made outside of a run"
    quiet_renamed_collectives()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield build_mesh(parallel, host_backend="fake")
    finally:
        if needs_parallel_state(parallel):
            import_parallel_state().destroy_model_parallel()
        dist.destroy_process_group()


def simulate(config: Config, mesh: Mesh, rows: int, *, on_cpu: bool = False) -> list[Passes]:
    """The passes of a micro-batch of `rows` rows under the config's layout, on this rank of the mesh: of each of the
    parts of the model that it holds, which are several where the pipeline is interleaved.

    on_cpu: keep what CPUs keep beyond what GPUs do.
    """
    # Built in the dtype it is trained in: tensors without storage cannot be cast in place.
    dtype = _default_dtype(DTYPES[config.precision.dtype])
    forms = contextlib.nullcontext() if on_cpu else _as_on_gpus()
    with FakeTensorMode(allow_non_fake_inputs=True), dtype, forms, _recurrences_without_values():
        parts = build_parts(config, mesh, torch.device("cpu"))
        objective = pretended_objective(config)
        batch = pretended_batch(config, rows)
        return [_passes(part, config, mesh, objective, batch) for part in parts]


def _passes(part: Part, config: Config, mesh: Mesh, objective: Objective, batch: Batch) -> Passes:
    for parameter in part.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch = objective.planned(part.sequences.part_of(batch))

    def stage() -> Continued:
        return Continued(part.model, None if part.is_first else received(config, mesh, batch))

    def body() -> Tensor:
        return stage()(*objective.inputs(batch))

    def whole() -> Tensor:
        return objective(stage(), batch).total  # type: ignore[arg-type]  # as the engine calls it

    up_to_norm = _tracked(mesh, body)
    with_loss = _tracked(mesh, whole) if part.is_last else up_to_norm
    sizes = [parameter.numel() for parameter in part.model.parameters()]
    return Passes(
        kept=with_loss.kept,
        body=up_to_norm.tracker.peak,
        peak=with_loss.tracker.peak,
        traffic=with_loss.tracker.traffic,
        calls=with_loss.tracker.calls,
        parameters=sum(sizes),
        small=sum(size for size in sizes if size <= small_parameter(config.model.width)),
        aligned=sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes),
    )


def received(config: Config, mesh: Mesh, batch: Batch) -> Tensor:
    """Hidden states as the stage before sends them."""
    rows, time = batch.tokens.shape
    ranks = mesh.tensor.size if config.parallel.sequence else 1
    return torch.empty(rows, time // ranks, config.model.width, requires_grad=True)


@dataclass(frozen=True)
class _Tracked:
    kept: int
    tracker: TensorTracker


def _tracked(mesh: Mesh, forward: Callable[[], Tensor]) -> _Tracked:
    with TensorTracker(axis_names(mesh)) as tracker:
        out = forward()
        kept = tracker.live
        # A loss, or the hidden states whose gradient the next stage sends back.
        out.backward(None if out.dim() == 0 else torch.empty_like(out))
    return _Tracked(kept, tracker)


def axis_names(mesh: Mesh) -> Callable[[dist.ProcessGroup], str]:
    """What to call a group: its axis of the mesh; "ends" where a tied embedding's two stages meet; else "other"."""
    groups = {axis: getattr(mesh, axis).group for axis in ("tensor", "context", "pipeline", "replicas")}
    # One group may be several axes, the others having one rank: the first is meant.
    by_name = {group.group_name: axis for axis, group in reversed(groups.items())}
    if mesh.ends is not None:
        by_name.setdefault(mesh.ends.group_name, "ends")
    return lambda group: by_name.get(group.group_name, "other")


@contextlib.contextmanager
def _as_on_gpus() -> Iterator[None]:
    """Tensors without storage are a CPU's here. Its forms of two layers keep what a GPU's never make: the mask of
    softmax attention with ALiBi, and the weights of sigmoid attention where they are few."""
    with _replaced(SoftmaxAttention, "_mask", lambda *_: None), _replaced(sigmoid_op, "KEPT_ELEMENTS", 0):
        yield


@contextlib.contextmanager
def _recurrences_without_values() -> Iterator[None]:
    """Newton's method in plain torch takes the solver's `iterations`: a residual that has no value cannot end it. Nor
    can the structure of a user's cell be looked at; it was when the whole model was built."""

    def go_on(_worst: Tensor, taken: int, solver: Solver) -> tuple[bool, bool]:
        return taken < solver.iterations, False

    unchecked = _replaced(cells, "check_structure", lambda *_inputs, **_settings: None)
    with _replaced(newton, "go_on", go_on), _replaced(newton_split, "go_on", go_on), unchecked:
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    usual = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, usual)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def pretended_objective(config: Config) -> Objective:
    """The config's objective, on a vocabulary of the planned size."""
    if config.objective.rows == "cut":
        return build_objective(config)
    size = config.model.vocabulary - len(SPECIALS)
    return build_objective(config, Vocabulary(Modality("text", 0, size, "planned"), eot=0))


def pretended_batch(config: Config, rows: int) -> Batch:
    """Rows of one document each, without segment ids: which documents there are changes no size."""
    length = config.data.sequence_length
    axes = getattr(config.model, "position_axes", 1)
    positions = torch.zeros((rows, length) if axes == 1 else (rows, length, axes), dtype=torch.int16)
    tokens = torch.zeros((rows, length + 1), dtype=torch.int64)
    return Batch(
        sequences=tokens,
        weights=torch.ones((rows, length), dtype=torch.bool),
        segment_ids=None,  # type: ignore[arg-type]  # the model takes None for rows of one document
        positions=positions,
        rows=torch.arange(rows),
        cursor=Cursor(rows, "planned"),
    )
