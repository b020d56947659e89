"""A run's step as a job: what one of its ranks computes and sends."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pretrain.engine.buckets import bucket_elements
from pretrain.parallel.stages import blocks_of_stages
from pretrain.plan.kernels import RECOMPUTED, Load
from pretrain.plan.memory import BYTES, FP32_BYTES, LIVE_ELEMENTS
from pretrain.plan.network import Group
from pretrain.plan.timing import Job, Message

if TYPE_CHECKING:
    from pretrain.config import Config
    from pretrain.hardware import Accelerator
    from pretrain.plan.constants import Constants
    from pretrain.plan.simulate import Passes
    from pretrain.plan.tracker import Traffic

ADAM_PASSES = 8
"""Times that an update goes over an fp32 tensor of the rank's share: reads gradient, master and two moments, writes
the last three, and the weight."""
HOST_PASSES = 4
"""With `parallel.offload`, beside those and in the training dtype: gradients are copied in, weights out."""
MEGATRON_BLOCK = 128
"""Megatron fills a sharded buffer up to a multiple of this and of the replicas."""


def job_of(
    config: Config,
    accelerator: Accelerator,
    constants: Constants,
    *,
    stage: int,
    passes: Sequence[Passes],
    handed_on: Traffic,
    replicas: int,
    micro_rows: int,
    micro_batches: int,
) -> Job:
    """Of a rank of this stage of the pipeline. handed_on: what it sends to other stages per micro-batch."""
    parallel, model, data = config.parallel, config.model, config.data
    blocks = len(blocks_of_stages(model.layers, parallel.pipeline)[stage])
    parameters = sum(part.parameters for part in passes)
    world = parallel.tensor * replicas * parallel.pipeline
    load = Load(
        layers={work: count * blocks / model.layers for work, count in model.layer_work().items()},
        positions=micro_rows * data.sequence_length / parallel.context,
        sequence_length=data.sequence_length,
        width=model.width,
        vocabulary=model.vocabulary,
        head=getattr(model, "logit_share", 1.0) if stage == parallel.pipeline - 1 else 0.0,
        tensor=parallel.tensor,
        sequence=parallel.sequence,
        dtype=config.precision.dtype,
        fused=parallel.compile,
        recomputed=RECOMPUTED[parallel.activation_checkpointing],
    )
    return Job(
        load=load,
        exchange=_exchange(config, passes, handed_on, world, constants),
        between=_between(config, passes, replicas, micro_batches, accelerator),
        micro_batches=micro_batches,
        update=update_seconds(
            config, accelerator, constants, parameters / (replicas if parallel.zero else 1)
        ),
        world=world,
        pipeline=parallel.pipeline,
        chunks=parallel.pipeline_chunks,
    )


def _exchange(
    config: Config, passes: Sequence[Passes], handed_on: Traffic, world: int, constants: Constants
) -> list[Message]:
    """Messages within a replica, per micro-batch: as the simulated passes sent them, and between stages."""
    parallel = config.parallel
    groups = {
        "tensor": Group(parallel.tensor, 1, world),
        "context": Group(parallel.context, parallel.tensor, world),
    }
    sizes: Traffic = sum((part.traffic for part in passes), Counter())
    calls: Traffic = sum((part.calls for part in passes), Counter())
    found = [
        Message(
            axis,  # type: ignore[arg-type]  # one of the two
            kind,
            size,
            groups[axis],
            calls[axis, kind],
            factor=constants.tensor_messages if axis == "tensor" else 1.0,
        )
        for (axis, kind), size in sizes.items()
        if axis in groups
    ]
    between_stages = Group(parallel.pipeline, world // parallel.pipeline, world)
    found += [
        Message("pipeline", kind, size, between_stages, parallel.pipeline_chunks)
        for (_, kind), size in handed_on.items()
        if kind == "send"  # what is received was sent, over the same link
    ]
    return found


def replica_traffic(config: Config, passes: Sequence[Passes], replicas: int, micro_batches: int) -> Traffic:
    """Bytes that the engine moves between replicas in one step, by collective, as it calls them."""
    found: Traffic = Counter()
    for message in _replica_messages(config, passes, replicas, micro_batches):
        times = micro_batches if message.per == "micro_batch" else 1
        found["replicas", message.kind] += int(times * message.size)
    return found


def _between(
    config: Config, passes: Sequence[Passes], replicas: int, micro_batches: int, accelerator: Accelerator
) -> list[Message]:
    """The same, with the nodes in which backward passes gather under `zero_group: node`."""
    found = _replica_messages(config, passes, replicas, micro_batches)
    if config.parallel.zero_group != "node":
        return found
    in_node = Group(replicas, config.parallel.tensor).in_node(accelerator.gpus_per_node)
    near = Group(in_node, config.parallel.tensor)
    return [
        Message(one.axis, one.kind, one.size, near, one.calls, one.beside, one.per)
        if one.kind == "allgather_base" and one.beside == "backward"
        else one
        for one in found
    ]


def _replica_messages(
    config: Config, passes: Sequence[Passes], replicas: int, micro_batches: int
) -> list[Message]:
    """As the engines are set up, ZeRO 3 alone sends while it computes: the others send after a backward pass."""
    if replicas == 1:
        return []
    parallel, width = config.parallel, BYTES[config.precision.dtype]
    parameters = sum(part.parameters for part in passes)
    world = parallel.tensor * replicas * parallel.pipeline
    group, layers = Group(replicas, parallel.tensor, world), float(config.model.layers)
    buckets = float(-(-parameters // bucket_elements(parameters)))

    def message(kind: str, size: float, **how: object) -> Message:
        return Message("replicas", kind, size, group, **how)  # type: ignore[arg-type]  # as Message has them

    if parallel.chosen_engine == "megatron" and parallel.zero == 0:
        return [message("allreduce", FP32_BYTES * parameters, calls=buckets, per="step")]
    if parallel.chosen_engine == "megatron":
        block = math.lcm(replicas, MEGATRON_BLOCK)
        padded = sum(-(-part.aligned // block) * block for part in passes)
        return [
            message("reduce_scatter_base", FP32_BYTES * padded, calls=buckets, per="step"),
            message("allgather_base", width * padded, calls=buckets, per="step"),
        ]
    if parallel.zero == 0:
        return [message("allreduce", width * parameters, calls=buckets, per="step")]
    if parallel.zero < 3:
        per = "micro_batch" if parallel.zero == 2 else "step"
        return [
            message("allreduce", width * parameters, calls=buckets, per=per),
            message("allgather_base", width * parameters, calls=buckets, per="step"),
        ]
    # Gathered again for the backward pass where they do not all stay; small ones once, after the update.
    small = sum(part.small for part in passes)
    found = [
        message("allgather_base", width * (parameters - small), calls=layers, beside="forward"),
        message("reduce_scatter_base", width * parameters, calls=layers, beside="backward"),
        message("allgather_base", width * small, per="step"),
    ]
    if parameters > LIVE_ELEMENTS:
        found.append(message("allgather_base", width * (parameters - small), calls=layers, beside="backward"))
    return found


def update_seconds(config: Config, accelerator: Accelerator, constants: Constants, share: float) -> float:
    """Of a rank that updates `share` parameters."""
    moved = ADAM_PASSES * FP32_BYTES * share
    if config.parallel.offload == "none":
        return moved / (accelerator.memory_gb_s * 1e9 * constants.memory)
    copied = HOST_PASSES * BYTES[config.precision.dtype] * share
    return (moved + copied) / (accelerator.host_gb_s * 1e9)
