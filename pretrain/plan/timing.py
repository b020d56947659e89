"""How long a step takes, predicted from what a rank computes and sends.

A step is `m` micro-batches of forward and backward passes, what of the messages does not hide behind them, the idle
time of the pipeline, the update, and the wait for the slowest rank:

    t = [m (forward + backward + exchange) + between replicas, what does not hide] (1 + bubble) + update, straggling

    forward, backward  `pretrain.plan.kernels`; what is recomputed counts in the backward pass
    exchange   messages of the tensor, context and pipeline axes: between products, so they hardly hide
    bubble     (stages - 1) / (chunks x m): 1F1B, and interleaved with several chunks per rank
    replicas   gradients and parameters between ranks with the same weights: beside a pass where the engine overlaps,
               which they slow by `contention` of their time; else after it
    update     bytes that Adam reads and writes / the memory's bandwidth: the host's, with `parallel.offload`
    straggling of all of that, per doubling of the nodes
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pretrain.hardware import Accelerator
from pretrain.plan import network
from pretrain.plan.constants import Constants
from pretrain.plan.kernels import Computing, Device, Load, computing
from pretrain.plan.network import Group

Beside = Literal["forward", "backward"] | None


@dataclass(frozen=True)
class Message:
    """Collectives of one kind among one group.

    size: bytes of them all, the larger side of each; calls: how many. beside: the pass during which they are under way;
    None: nothing is computed meanwhile. per: whether each micro-batch sends them or each step. factor: on their time.
    """

    axis: Literal["tensor", "context", "pipeline", "replicas"]
    kind: str
    size: float
    group: Group
    calls: float = 1.0
    beside: Beside = None
    per: Literal["micro_batch", "step"] = "micro_batch"
    factor: float = 1.0

    def seconds(self, accelerator: Accelerator, constants: Constants) -> float:
        return self.factor * network.seconds(
            self.kind, self.size, self.group, accelerator, constants, calls=self.calls
        )


@dataclass(frozen=True)
class Job:
    """A step of one rank.

    exchange: messages within a replica. between: those of replicas. update: seconds. world: all ranks.
    """

    load: Load
    exchange: Sequence[Message]
    between: Sequence[Message]
    micro_batches: int
    update: float
    world: int
    pipeline: int = 1
    chunks: int = 1


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step."""

    products: float
    fused: float
    """Attention and state spaces."""
    memory: float
    """Memory-bound kernels."""
    recomputed: float
    exchange: float
    bubble: float
    replicas: float
    """What does not hide behind the computation, and what it slows that by."""
    update: float
    straggling: float

    @property
    def compute(self) -> float:
        return self.products + self.fused + self.memory + self.recomputed

    @property
    def total(self) -> float:
        return self.compute + self.exchange + self.bubble + self.replicas + self.update + self.straggling


def bubble_share(pipeline: int, chunks: int, micro_batches: int) -> float:
    """Idle time of the pipeline, as a share of the time that its ranks work."""
    return (pipeline - 1) / (chunks * micro_batches)


def step_time(job: Job, accelerator: Accelerator, constants: Constants) -> StepTime:
    """Of this rank."""
    forward, backward = computing(job.load, Device(accelerator, constants, job.load.dtype))
    micro_batches = job.micro_batches
    computed: Computing = (forward + backward).times(micro_batches)
    exchange = sum(message.seconds(accelerator, constants) for message in job.exchange)
    # A third of a layer's messages are the forward pass's.
    lengths = {"forward": forward.total + exchange / 3, "backward": backward.total + 2 * exchange / 3}
    replicas = 0.0
    for beside, length in lengths.items():
        of_pass = [message for message in job.between if message.beside == beside]
        often, once = (
            sum(one.seconds(accelerator, constants) for one in of_pass if one.per == per)
            for per in ("micro_batch", "step")
        )
        # What a step sends once is beside one of its micro-batches.
        replicas += (micro_batches - 1) * _shown(often, length, constants)
        replicas += _shown(often + once, length, constants)
    for message in job.between:
        if message.beside is None:
            times = micro_batches if message.per == "micro_batch" else 1
            replicas += times * message.seconds(accelerator, constants)
    working = computed.total + micro_batches * exchange + replicas
    bubble = working * bubble_share(job.pipeline, job.chunks, micro_batches)
    doublings = math.log2(max(1.0, job.world / accelerator.gpus_per_node))
    return StepTime(
        products=computed.products,
        fused=computed.fused,
        memory=computed.memory,
        recomputed=computed.recomputed,
        exchange=micro_batches * exchange,
        bubble=bubble,
        replicas=replicas,
        update=job.update,
        straggling=constants.straggling * doublings * (working + bubble + job.update),
    )


def _shown(messages: float, computed: float, constants: Constants) -> float:
    """By how much messages under way lengthen a pass: they slow it, and what is left of them follows it."""
    return max(computed + constants.contention * min(messages, computed), messages) - computed
