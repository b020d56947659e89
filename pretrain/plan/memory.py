"""What one rank holds, by kind, and when that is most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pretrain.engine.buckets import bucket_elements

if TYPE_CHECKING:
    from pretrain.config import Config, ParallelSection
    from pretrain.plan.simulate import Passes

BYTES = {"fp32": 4, "bf16": 2}
FP32_BYTES = 4
LIVE_ELEMENTS = 1_000_000_000
"""Of gathered parameters that DeepSpeed keeps under ZeRO 3 (its stage3_max_live_parameters)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    """Where the engine gathers gradients before it reduces them, and under ZeRO 3 the parameters in use."""
    activations: int = 0
    """What the passes hold at their peak, the head's part excluded: of all micro-batches that are under way."""
    logits: int = 0
    """What the head and the loss add to that peak."""
    update: int = 0
    """What the update works on when the activations are gone: the fp32 copy of a bf16 gradient share."""
    host: int = 0
    """Beside the device, in host memory: what `parallel.offload` keeps there. Staging of a save is not counted."""
    gradients_wait: bool = True
    """Whether gradients are whole while the passes are at their peak: not with one micro-batch per step."""

    @property
    def state(self) -> int:
        """What stays between steps, and the gradients."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def during_passes(self) -> int:
        accumulated = self.gradients + self.buffers if self.gradients_wait else 0
        return self.parameters + self.optimizer + accumulated + self.activations + self.logits

    @property
    def during_update(self) -> int:
        return self.state + self.buffers + self.update

    @property
    def total(self) -> int:
        """The most at any time."""
        return max(self.during_passes, self.during_update)


def state_memory(parameters: int, config: Config, replicas: int, accumulation: int = 1) -> Memory:
    """Parameters, gradients, optimizer and buffers of a rank with this many parameters, `replicas` ranks of which
    share what the ZeRO stage says, with so many micro-batches per step. `benchmarks.plan` compares with what the
    engines hold."""
    if config.parallel.chosen_engine == "megatron":
        return _megatron(parameters, config, replicas)
    return _deepspeed(parameters, config, replicas, accumulation)


def _deepspeed(parameters: int, config: Config, replicas: int, accumulation: int) -> Memory:
    """From stage 1 on, DeepSpeed keeps an fp32 master copy of the rank's share, also of an fp32 model."""
    if config.parallel.offload == "optimizer":
        return _offloaded(parameters, config, replicas, accumulation)
    zero, width = config.parallel.zero, BYTES[config.precision.dtype]
    share = parameters / replicas
    return Memory(
        parameters=int(width * (share if zero == 3 else parameters)),
        gradients=int(width * (share if zero >= 2 else parameters)),
        optimizer=int(FP32_BYTES * (2 * parameters if zero == 0 else 3 * share)),
        buffers=_buffers(parameters, config, replicas, accumulation),
        update=int(FP32_BYTES * share) if zero and config.precision.dtype == "bf16" else 0,
        # Stage 3 has a place for the gradient share, and the bucket, from the first.
        gradients_wait=zero == 3,
    )


def _offloaded(parameters: int, config: Config, replicas: int, accumulation: int) -> Memory:
    """ZeRO with masters, moments and the gradient share in host memory, where from stage 2 on all gradients go."""
    zero, width = config.parallel.zero, BYTES[config.precision.dtype]
    share = parameters / replicas
    # Beside the fp32 gradient share: what a share's weights return through, and what micro-batches add up in.
    # Stage 3 returns them without, and always has the sum.
    copies = 1 if zero == 3 or accumulation == 1 else 2
    return Memory(
        parameters=int(width * (share if zero == 3 else parameters)),
        gradients=0 if zero >= 2 else width * parameters,
        optimizer=0,
        buffers=_buffers(parameters, config, replicas, accumulation),
        host=int((4 * FP32_BYTES + copies * width) * share),
        gradients_wait=zero == 3,
    )


def _buffers(parameters: int, config: Config, replicas: int, accumulation: int) -> int:
    """Of gradients that are being reduced, and under stage 3 of gathered parameters."""
    zero, width = config.parallel.zero, BYTES[config.precision.dtype]
    bucket = width * bucket_elements(parameters) if zero else 0
    gathered = width * min(parameters, LIVE_ELEMENTS) if zero == 3 else 0
    if zero == 3 and accumulation > 1:
        bucket *= 2  # what it scattered last stays until the next
    if config.parallel.zero_group == "node":  # the second copy
        gathered += width * parameters // replicas_per_node(config, replicas)
    return bucket + gathered


def replicas_per_node(config: Config, replicas: int) -> int:
    """Ranks of a node are numbered tensor first."""
    return min(replicas, max(1, config.launch.gpus_per_node // config.parallel.tensor))


def lone_replicas(config: Config, replicas: int) -> bool:
    """Whether a copy per node is asked for that each rank would have to hold alone, which the run refuses."""
    return config.parallel.zero_group == "node" and replicas_per_node(config, replicas) == 1


def _megatron(parameters: int, config: Config, replicas: int) -> Memory:
    """Gradients are summed in one fp32 buffer, which is there all the time."""
    width, half = BYTES[config.precision.dtype], config.precision.dtype == "bf16"
    share = parameters / replicas if config.parallel.zero else parameters
    masters = share if half else 0
    return Memory(
        parameters=width * parameters,
        gradients=FP32_BYTES * parameters,
        optimizer=int(FP32_BYTES * (masters + 2 * share)),
        buffers=0,
    )


def most_in_flight(parallel: ParallelSection, stage: int, micro_batches: int) -> float:
    """Micro-batches whose forward pass waits for its backward pass, at most, the one under way included; a fraction
    counts chunks of an interleaved pipeline.

    Source: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters", and Megatron's schedules.
    """
    ranks, chunks = parallel.pipeline, parallel.pipeline_chunks
    if chunks == 1:
        return min(micro_batches, ranks - stage)
    ahead = 2 * (ranks - stage - 1) + (chunks - 1) * ranks + 1
    return min(chunks * micro_batches, ahead) / chunks


def with_passes(state: Memory, passes: Sequence[Passes], *, accumulation: int, in_flight: float) -> Memory:
    """With what the passes of a rank's parts hold, of which `in_flight` are under way."""
    waiting = in_flight * sum(part.kept for part in passes)
    inside = max(part.body - part.kept for part in passes)
    return replace(
        state,
        activations=int(waiting + inside),
        logits=max(part.logits for part in passes),
        gradients_wait=state.gradients_wait or accumulation > 1,
    )
