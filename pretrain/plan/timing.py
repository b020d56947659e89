"""How long a step takes, predicted from what it computes and sends.

A rank's step is `m` micro-batches, the idle time of the pipeline, what of the replicas' exchange does not hide
behind the computation, and the update:

    t = m (compute + exchange) (1 + bubble) + max(0, replicas - hidden) + update

    compute    FLOPs of a micro-batch on this rank / (EFFICIENCY x peak); what is recomputed counts
    exchange   bytes of the tensor, context and pipeline axes / the bandwidth of the links they cross: not hidden
    bubble     (stages - 1) / (chunks x m): 1F1B, and interleaved with several chunks per rank
    replicas   gradients and parameters between ranks with the same weights
    hidden     m compute under ZeRO 3; else 0
    update     bytes that Adam reads and writes / the memory's bandwidth: the host's, with `parallel.offload`

A collective over n ranks of b bytes (the larger side) puts (n - 1) / n b on a rank's link, an all-reduce twice that.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pretrain.plan.memory import BYTES, FP32_BYTES, LIVE_ELEMENTS

if TYPE_CHECKING:
    from pretrain.config import Config, ParallelSection
    from pretrain.hardware import Accelerator
    from pretrain.plan.simulate import Passes
    from pretrain.plan.tracker import Traffic

EFFICIENCY = 0.55
"""Of the peak that the kernels of a block reach, by the throughputs that makers and trainers publish for dense models
of this size; kernels of recurrences are not matrix products and take their share of this."""
LINK_EFFICIENCY = 0.8
"""Of a link's bandwidth that large collectives reach."""
RECOMPUTED = {"none": 0.0, "selective": 0.02, "full": 1 / 3}
"""FLOPs done twice, as a share of forward and backward."""
ADAM_PASSES = 8
"""Times that an update goes over an fp32 tensor of the rank's share: reads gradient, master and two moments, writes
the last three, and the weight."""
HOST_PASSES = 4
"""With `parallel.offload`, beside those and in the training dtype: gradients are copied in, weights out."""
MEGATRON_BLOCK = 128
"""Megatron fills a sharded buffer up to a multiple of this and of the replicas."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step."""

    compute: float
    exchange: float
    bubble: float
    replicas: float
    """What does not hide behind the computation."""
    update: float

    @property
    def total(self) -> float:
        return self.compute + self.exchange + self.bubble + self.replicas + self.update


def replica_traffic(config: Config, passes: Sequence[Passes], replicas: int, micro_batches: int) -> Traffic:
    """Bytes that the engine moves between replicas in one step, by collective, as it calls them."""
    if replicas == 1:
        return Counter()
    parallel, width = config.parallel, BYTES[config.precision.dtype]
    parameters, axis = sum(part.parameters for part in passes), "replicas"
    reduced, gathered = (axis, "reduce_scatter_base"), (axis, "allgather_base")
    if parallel.chosen_engine == "megatron" and parallel.zero == 0:
        return Counter({(axis, "allreduce"): FP32_BYTES * parameters})
    if parallel.chosen_engine == "megatron":
        block = math.lcm(replicas, MEGATRON_BLOCK)
        padded = sum(-(-part.aligned // block) * block for part in passes)
        return Counter({reduced: FP32_BYTES * padded, gathered: width * padded})
    if parallel.zero == 0:
        return Counter({(axis, "allreduce"): width * parameters})
    if parallel.zero < 3:
        times = micro_batches if parallel.zero == 2 else 1
        return Counter({(axis, "allreduce"): times * width * parameters, gathered: width * parameters})
    # Gathered again for the backward pass where they do not all stay; small ones once, after the update.
    times = micro_batches * (1 if parameters <= LIVE_ELEMENTS else 2)
    small = sum(part.small for part in passes)
    return Counter(
        {
            gathered: width * (times * (parameters - small) + small),
            reduced: micro_batches * width * parameters,
        }
    )


def bubble_share(config: Config, micro_batches: int) -> float:
    """Idle time of the pipeline, as a share of the time that its ranks work."""
    parallel = config.parallel
    return (parallel.pipeline - 1) / (parallel.pipeline_chunks * micro_batches)


def seconds_of(traffic: Traffic, axis: str, ranks: int, gb_s: float) -> float:
    """Of the collectives of one axis over links of this bandwidth."""
    moved = 0.0
    for (name, kind), size in traffic.items():
        if name == axis:
            hops = 1.0 if kind in ("send", "recv") else (ranks - 1) / ranks
            moved += size * hops * (2 if kind == "allreduce" else 1)
    return moved / (gb_s * 1e9 * LINK_EFFICIENCY)


def bandwidth(parallel: ParallelSection, axis: str, replicas: int, accelerator: Accelerator) -> float:
    """GB/s of the slowest link that an axis crosses: ranks are numbered tensor first, then context, data, pipeline."""
    reach = {"tensor": parallel.tensor, "context": parallel.tensor * parallel.context}
    reach["replicas"] = parallel.tensor * replicas
    reach["pipeline"] = world = reach["replicas"] * parallel.pipeline
    # Groups of 3 in nodes of 8: one of them has a rank on the next node.
    within = world <= accelerator.gpus_per_node or accelerator.gpus_per_node % reach[axis] == 0
    return accelerator.node_gb_s if within else accelerator.network_gb_s


def step_time(
    config: Config,
    accelerator: Accelerator,
    *,
    flops: float,
    traffic: Traffic,
    between_replicas: Traffic,
    parameters: int,
    replicas: int,
    micro_batches: int,
) -> StepTime:
    """Of the slowest rank.

    flops: of one micro-batch on this rank, forward and backward, nothing computed twice.
    traffic: of one micro-batch on this rank. between_replicas: of the step.
    """
    parallel = config.parallel
    peak = accelerator.peak_teraflops[config.precision.dtype] * 1e12 * EFFICIENCY
    compute = micro_batches * flops * (1 + RECOMPUTED[parallel.activation_checkpointing]) / peak
    sizes = {"tensor": parallel.tensor, "context": parallel.context, "pipeline": parallel.pipeline}
    exchange = micro_batches * sum(
        seconds_of(traffic, axis, ranks, bandwidth(parallel, axis, replicas, accelerator))
        for axis, ranks in sizes.items()
        if ranks > 1
    )
    link = bandwidth(parallel, "replicas", replicas, accelerator)
    between = seconds_of(between_replicas, "replicas", replicas, link)
    # As the engines are set up, ZeRO 3 alone sends while it computes: the others send after a backward pass.
    beside = compute if parallel.zero == 3 else 0.0
    share = parameters / (replicas if parallel.zero else 1)
    return StepTime(
        compute=compute,
        exchange=exchange,
        bubble=(compute + exchange) * bubble_share(config, micro_batches),
        replicas=max(0.0, between - beside),
        update=update_seconds(config, accelerator, share),
    )


def update_seconds(config: Config, accelerator: Accelerator, share: float) -> float:
    """Of a rank that updates `share` parameters."""
    moved = ADAM_PASSES * FP32_BYTES * share
    if config.parallel.offload == "none":
        return moved / (accelerator.memory_gb_s * 1e9)
    copied = HOST_PASSES * BYTES[config.precision.dtype] * share
    return (moved + copied) / (accelerator.host_gb_s * 1e9)
