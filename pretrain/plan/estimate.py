"""What a run will need: parameters, memory, traffic, time and the optimizer's settings as they will be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from models import families
from pretrain.config.nearest import check_layout
from pretrain.config.world import data_parallel_size, micro_batch_rows
from pretrain.errors import ConfigError
from pretrain.hardware import Accelerator
from pretrain.optim import parameter_groups
from pretrain.optim.scaling import Scaled, resolve
from pretrain.parallel.nodes import LONE_REPLICAS
from pretrain.parallel.stages import whole_model
from pretrain.plan.constants import constants
from pretrain.plan.jobs import job_of, replica_traffic
from pretrain.plan.machine import planned_machine
from pretrain.plan.memory import (
    BYTES,
    FP32_BYTES,
    Memory,
    lone_replicas,
    most_in_flight,
    state_memory,
    with_passes,
)
from pretrain.plan.parameters import parameters_by_group, resolved
from pretrain.plan.simulate import Passes, pretended_mesh, simulate
from pretrain.plan.timing import StepTime, step_time
from pretrain.plan.tracker import Traffic

if TYPE_CHECKING:
    from pretrain.config import Config

GROUP_KEYS = ("type", "peak_lr", "eps")


@dataclass(frozen=True)
class Group:
    """Parameters that the optimizer treats alike."""

    type: str
    lr: float
    """At the schedule's peak."""
    epsilon: float


@dataclass(frozen=True)
class Layout:
    """What the layout makes of the run, on the rank that holds most."""

    memory: Memory
    stage: int
    """Of the pipeline: the rank that holds most is one of its."""
    stages: int
    traffic: Traffic
    """Bytes through the collectives of one rank in one step, by axis and kind."""
    time: StepTime
    micro_batch_rows: int
    accumulation: int


@dataclass(frozen=True)
class Plan:
    parameters: Mapping[str, int]
    """By group: embedding, attention, mlp, norm, head."""
    layout: Layout
    flops_per_token: float
    """Forward and backward."""
    tokens_per_step: int
    tokens: int
    optim: Scaled
    """The optimizer's settings after `optim.scaling`."""
    groups: tuple[Group, ...]
    attention_bias: float | None
    gpus: int
    accelerator: Accelerator
    mfu: float
    """Stated, or what the predicted step time comes to."""
    seconds: float

    @property
    def memory(self) -> Memory:
        return self.layout.memory

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.gpus / 3600


def make_plan(config: Config, *, gpus: int, gpu: str, mfu: float | None = None) -> Plan:
    """Plan `config` on `gpus` devices of a kind. mfu: model FLOPs utilisation to reckon the run's time with; None:
    that of the predicted step.

    Raises ConfigError for a device that is not in the table, and a layout that does not fit.
    """
    assert not config.parallel.auto, "choose_layout decides what is open before anything is planned"
    accelerator = planned_machine(config, gpu)
    if mfu is not None and not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu}: should be above 0 and at most 1; 0.4 is usual")
    check_layout(config, gpus)
    config = resolved(config)
    family, model_config = families[config.model.family], config.model
    model = whole_model(config)
    scaled = resolve(config, model)
    transfer, width, layers = getattr(model_config, "transfer", None), model_config.width, model_config.layers
    types = parameter_groups(
        model.named_parameters(), model.declared, scaled.optim, width, layers=layers, transfer=transfer
    )
    layout = plan_layout(config, gpus, accelerator)
    flops = family.flops_per_token(model_config, config.data.sequence_length)
    tokens_per_step = config.data.global_batch_rows * config.data.sequence_length
    peak = accelerator.peak_teraflops[config.precision.dtype] * 1e12 * gpus
    used = flops * tokens_per_step / (peak * layout.time.total) if mfu is None else mfu
    tokens = tokens_per_step * config.run.steps
    return Plan(
        parameters=parameters_by_group(model),
        layout=layout,
        flops_per_token=flops,
        tokens_per_step=tokens_per_step,
        tokens=tokens,
        optim=scaled,
        groups=tuple(Group(*(group[key] for key in GROUP_KEYS)) for group in types),
        attention_bias=getattr(model_config, "attention_bias", None),
        gpus=gpus,
        accelerator=accelerator,
        mfu=used,
        seconds=flops * tokens / (peak * used),
    )


def plan_layout(config: Config, gpus: int, accelerator: Accelerator, *, on_cpu: bool = False) -> Layout:
    """The layout of a resolved config on the rank that holds most: one of the first stage, which waits longest for
    its backward passes, or of the last, which has the head; in the time of the slower of the two.

    on_cpu: plan what a CPU's forms of the layers keep, to compare with a measurement there.
    """
    parallel = config.parallel
    data_ranks = data_parallel_size(parallel, gpus, config.data.global_batch_rows)
    if lone_replicas(config, data_ranks * parallel.context):
        raise ConfigError(LONE_REPLICAS)
    micro_rows = micro_batch_rows(config.data, data_ranks, parallel)
    passes = {}
    for stage in sorted({0, parallel.pipeline - 1}):
        # Megatron numbers the ranks of a stage one after the other.
        with pretended_mesh(parallel, gpus, rank=stage * gpus // parallel.pipeline) as mesh:
            passes[stage] = simulate(config, mesh, micro_rows, on_cpu=on_cpu)
    layouts = [layout_of(config, accelerator, data_ranks, stage, found) for stage, found in passes.items()]
    return of_stages(layouts)


def of_stages(layouts: Sequence[Layout]) -> Layout:
    """One for the layouts of several stages: the most memory, and the slowest's time, for which the others wait."""
    slowest = max((layout.time for layout in layouts), key=lambda time: time.total)
    return replace(max(layouts, key=lambda layout: layout.memory.total), time=slowest)


def layout_of(
    config: Config, accelerator: Accelerator, data_ranks: int, stage: int, passes: list[Passes]
) -> Layout:
    """The layout on a rank of this stage, whose parts make these passes."""
    parallel, data = config.parallel, config.data
    micro_rows = micro_batch_rows(data, data_ranks, parallel)
    micro_batches = data.global_batch_rows // data_ranks // micro_rows
    parameters = sum(part.parameters for part in passes)
    replicas = data_ranks * parallel.context
    in_flight = most_in_flight(parallel, stage, micro_batches)
    state = state_memory(parameters, config, replicas, micro_batches)
    each: Traffic = sum((part.traffic for part in passes), Counter())
    between_stages = handed_on(config, stage, micro_rows)
    step = Counter({key: size * micro_batches for key, size in (each + between_stages).items()})
    between = replica_traffic(config, passes, replicas, micro_batches)
    job = job_of(
        config,
        accelerator,
        constants(),
        stage=stage,
        passes=passes,
        handed_on=between_stages,
        replicas=replicas,
        micro_rows=micro_rows,
        micro_batches=micro_batches,
    )
    return Layout(
        memory=with_passes(state, passes, accumulation=micro_batches, in_flight=in_flight),
        stage=stage,
        stages=parallel.pipeline,
        traffic=step + between + between_ends(config, stage, replicas),
        time=step_time(job, accelerator, constants()),
        micro_batch_rows=micro_rows,
        accumulation=micro_batches,
    )


def between_ends(config: Config, stage: int, replicas: int) -> Traffic:
    """Bytes of a tied embedding's gradient, which the first stage and the last add up once per step."""
    parallel, model = config.parallel, config.model
    if (
        parallel.pipeline == 1
        or stage not in (0, parallel.pipeline - 1)
        or not getattr(model, "tied_head", False)
    ):
        return Counter()
    rows = -(-model.vocabulary // parallel.tensor)
    share = rows * model.width // (replicas if parallel.zero else 1)
    return Counter({("ends", "allreduce"): FP32_BYTES * share})


def handed_on(config: Config, stage: int, rows: int) -> Traffic:
    """Bytes between the stages of a pipeline for one micro-batch, on a rank of this one: hidden states and their
    gradients."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return Counter()
    ranks_of_row = parallel.context * (parallel.tensor if parallel.sequence else 1)
    hidden = rows * config.data.sequence_length // ranks_of_row * config.model.width
    size = hidden * BYTES[config.precision.dtype]
    # The last stage of all hands nothing on, and the first gets nothing.
    chunks, ranks = parallel.pipeline_chunks, parallel.pipeline
    forward = chunks - (1 if stage == ranks - 1 else 0)
    backward = chunks - (1 if stage == 0 else 0)
    return Counter(
        {("pipeline", "send"): (forward + backward) * size, ("pipeline", "recv"): (forward + backward) * size}
    )
