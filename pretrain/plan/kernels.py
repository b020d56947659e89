"""How long a rank computes on one micro-batch: each matrix product by its shape, attention by its pairs, all else by
the bytes it moves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.layers.work import Fused, Product, Stream, Work

if TYPE_CHECKING:
    from pretrain.hardware import Accelerator
    from pretrain.plan.constants import Constants

BYTES = {"fp32": 4, "bf16": 2}
TILE = (128, 256)
"""Rows and columns of the output that a multiprocessor makes at once."""


@dataclass(frozen=True)
class Recomputed:
    """Shares of the forward pass that the backward pass makes again."""

    products: float = 0.0
    fused: float = 0.0
    streams: float = 0.0


RECOMPUTED: Mapping[str, Recomputed] = {
    "none": Recomputed(),
    "selective": Recomputed(streams=0.3),
    "full": Recomputed(1.0, 1.0, 1.0),
}
"""By parallel.activation_checkpointing. selective: the elementwise part of feed-forward layers and gates."""


@dataclass(frozen=True)
class Load:
    """What a rank computes for one micro-batch.

    layers: how many of each it holds. positions: its rows x their length / context ranks. sequence_length: whose keys
    attention sees. head: of how many of the positions logits are made; 0 on ranks without one.
    tensor, sequence: the ranks that share each layer, and whether they share the positions between layers too.
    fused: whether memory-bound kernels are (compiled, or written so).
    """

    layers: Mapping[Work, float]
    positions: float
    sequence_length: int
    width: int
    vocabulary: int
    head: float = 1.0
    tensor: int = 1
    sequence: bool = False
    dtype: str = "bf16"
    fused: bool = False
    recomputed: Recomputed = Recomputed()


@dataclass(frozen=True)
class Computing:
    """Seconds."""

    products: float = 0.0
    fused: float = 0.0
    """Attention and state spaces."""
    memory: float = 0.0
    """Memory-bound kernels, loss included."""
    recomputed: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.fused + self.memory + self.recomputed

    def __add__(self, other: Computing) -> Computing:
        return Computing(
            self.products + other.products,
            self.fused + other.fused,
            self.memory + other.memory,
            self.recomputed + other.recomputed,
        )

    def times(self, count: float) -> Computing:
        return Computing(
            count * self.products, count * self.fused, count * self.memory, count * self.recomputed
        )


@dataclass(frozen=True)
class Device:
    """An accelerator, and how much of it software reaches."""

    accelerator: Accelerator
    constants: Constants
    dtype: str = "bf16"

    @property
    def peak(self) -> float:
        """Multiply-adds per second that large products reach."""
        share: float = getattr(self.constants, f"products_{self.accelerator.generation}")
        return self.full_peak * share

    @property
    def full_peak(self) -> float:
        """Multiply-adds per second, as stated."""
        return self.accelerator.peak_teraflops[self.dtype] * 1e12 / 2 * self.accelerator.sustained

    @property
    def memory(self) -> float:
        """Bytes per second that memory-bound kernels reach."""
        return self.accelerator.memory_gb_s * 1e9 * self.constants.memory

    def product(self, rows: float, inputs: float, outputs: float) -> float:
        """Seconds of (rows, inputs) x (inputs, outputs): by the products, or by the bytes if these take longer."""
        tiles = math.ceil(rows / TILE[0]) * math.ceil(outputs / TILE[1])
        waves = tiles / self.accelerator.multiprocessors
        # The last wave fills the device in part only; schedulers split its tiles, which saves half of the loss.
        filling = 1 + (math.ceil(waves) / waves - 1) / 2
        multiplying = rows * inputs * outputs / self.peak * (1 + self.constants.narrow / inputs) * filling
        moved = BYTES[self.dtype] * (rows * inputs + inputs * outputs + rows * outputs)
        return max(multiplying, moved / self.memory)

    def fused_share(self, work: Fused, sequence_length: int) -> float:
        """Of the stated peak."""
        if work.kernel == "state space":
            return self.constants.state_space
        share: float = getattr(
            self.constants, f"{work.kernel.removesuffix(' attention')}_{self.accelerator.generation}"
        )
        share *= sequence_length / (sequence_length + self.constants.attention_ramp)
        return share * (self.constants.narrow_heads if work.head_width <= 64 else 1.0)


def computing(load: Load, device: Device) -> tuple[Computing, Computing]:
    """Of the forward and of the backward pass."""
    forward = backward = Computing()
    for work, count in load.layers.items():
        once, back = _layer(work, load, device)
        forward, backward = forward + once.times(count), backward + back.times(count)
    once, back = _head(load, device)
    return forward + once, backward + back


def _layer(work: Work, load: Load, device: Device) -> tuple[Computing, Computing]:
    products = [_product(product, load, device) for product in work.products]
    fused = [_fused(one, load, device) for one in work.fused]
    streams = [_stream(stream, load, device) for stream in work.streams]
    forward, backward = (
        Computing(*(sum(pair[side] for pair in kind) for kind in (products, fused, streams)))
        for side in (0, 1)
    )
    again = load.recomputed
    recomputed = (
        again.products * forward.products + again.fused * forward.fused + again.streams * forward.memory
    )
    return forward, backward + Computing(recomputed=recomputed)


def _product(product: Product, load: Load, device: Device) -> tuple[float, float]:
    inputs, outputs, copies = product.inputs, product.outputs, float(product.copies)
    if product.divided == "inputs":
        inputs /= load.tensor
    elif product.divided == "outputs":
        outputs /= load.tensor
    elif product.divided == "copies":
        copies /= load.tensor
    rows = load.positions
    forward = copies * device.product(rows, inputs, outputs)
    of_inputs = copies * device.product(rows, outputs, inputs)
    of_weights = copies * device.product(inputs, rows, outputs)
    return forward, (of_inputs + of_weights) * product.backward / 2


def _fused(fused: Fused, load: Load, device: Device) -> tuple[float, float]:
    multiplied = load.positions * fused.multiply_adds(load.sequence_length) / load.tensor
    forward = multiplied / (device.full_peak * device.fused_share(fused, load.sequence_length))
    return forward, fused.backward * forward


def _stream(stream: Stream, load: Load, device: Device) -> tuple[float, float]:
    ranks = (
        load.tensor
        if stream.divided == "features" or (stream.divided == "positions" and load.sequence)
        else 1
    )
    constants = device.constants
    rate = (
        device.accelerator.memory_gb_s * 1e9 * constants.recurrences
        if stream.name == "recurrence"
        else device.memory
    )
    more = 1.0 if stream.name == "recurrence" else constants.fused if load.fused else constants.unfused
    per_element = load.positions / ranks * BYTES[load.dtype] * more / rate
    forward, backward = stream.elements(fused=load.fused)
    return forward * per_element, backward * per_element


def _head(load: Load, device: Device) -> tuple[Computing, Computing]:
    """The head's product and the loss."""
    rows = load.positions * load.head
    if rows == 0:
        return Computing(), Computing()
    columns = load.vocabulary / load.tensor
    forward = device.product(rows, load.width, columns)
    backward = device.product(rows, columns, load.width) + device.product(load.width, rows, columns)
    loss = rows * columns * device.constants.logits / device.memory
    return Computing(products=forward, memory=loss / 2), Computing(products=backward, memory=loss / 2)
