"""What a layer makes a device do, for a planner: matrix products by their shapes, attention, and what is read and
written besides. Imports no torch.

All of it is per position of a row and of the forward pass, of the whole layer: a rank that holds a part of its heads
and features does `split` of it. Elements are of the training dtype; what is kept wider counts as more of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Division = Literal["features", "positions", "none"]
"""What tensor ranks divide of it: the features; with sequence parallelism the positions; or nothing."""
Kernel = Literal["sigmoid attention", "softmax attention", "state space"]


@dataclass(frozen=True)
class Product:
    """A matrix product, (..., inputs) by (inputs, outputs). copies: so many of that size, as a product per head is.

    divided: which of its sides tensor ranks divide. backward: how often its multiply-adds come again there.
    """

    name: str
    inputs: float
    outputs: float
    copies: int = 1
    divided: Literal["inputs", "outputs", "copies", "none"] = "none"
    backward: float = 2.0

    @property
    def multiply_adds(self) -> float:
        return self.copies * self.inputs * self.outputs


@dataclass(frozen=True)
class Fused:
    """Products within a kernel of its own, whose factors no one keeps: attention over pairs of positions, a state space
    over chunks.

    kernel: its name, for a planner that knows how fast each is. per_position, per_key: multiply-adds of a position, and
    of a position and each key in its row. causal: half of the keys are left out. divided: whether tensor ranks divide
    it, by heads. backward: how often the multiply-adds come again; attention's five products in place of two.
    """

    kernel: Kernel
    per_position: float = 0.0
    per_key: float = 0.0
    head_width: int = 128
    causal: bool = True
    backward: float = 2.5

    def multiply_adds(self, sequence_length: int) -> float:
        return self.per_position + self.per_key * sequence_length / (2 if self.causal else 1)


@dataclass(frozen=True)
class Stream:
    """Memory-bound work: how many elements are read and written, by its kernels as they stand (`forward`,
    `backward`), and by the best that fuses what can be (`fused_forward`, `fused_backward`)."""

    name: str
    forward: float
    backward: float
    fused_forward: float
    fused_backward: float
    divided: Division = "features"

    def elements(self, *, fused: bool) -> tuple[float, float]:
        """Forward and backward."""
        return (self.fused_forward, self.fused_backward) if fused else (self.forward, self.backward)


@dataclass(frozen=True)
class Work:
    """Of one layer."""

    products: tuple[Product, ...] = ()
    fused: tuple[Fused, ...] = ()
    streams: tuple[Stream, ...] = ()

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.fused + other.fused, self.streams + other.streams)

    def multiply_adds(self, sequence_length: int) -> float:
        """Per position, forward."""
        products = sum(product.multiply_adds for product in self.products)
        return products + sum(each.multiply_adds(sequence_length) for each in self.fused)


def norm(width: float, *, name: str = "norms", divided: Division = "positions") -> Stream:
    """An RMS norm: x in, y out; backwards x and the gradient in, a gradient out."""
    return Stream(name, 2 * width, 3 * width, 2 * width, 3 * width, divided)


def residual(width: float) -> Stream:
    """A branch is added: two in, one out; backwards the gradients of both paths are. Fused, the norm after it has read
    the branch already."""
    return Stream("residual stream", 3 * width, 3 * width, 2 * width, 2 * width, "positions")


def scaled(width: float) -> Stream:
    """A factor per feature."""
    return Stream("scales of branches", 2 * width, 4 * width, 0, width, "positions")


def feed_forward(width: int, hidden: int, *, gated: bool = True) -> Work:
    """`down(silu(gate(x)) * up(x))`, or without a gate."""
    if hidden == 0:
        return Work()
    into = (Product("feed-forward, in", width, hidden, divided="outputs"),) * (2 if gated else 1)
    out = Product("feed-forward, out", hidden, width, divided="inputs")
    # The activation 2 and 3 elements, the product with `up` 3 and 6; fused 3 and 5. Without a gate 2 and 3.
    if gated:
        activation = Stream("activation", 5 * hidden, 9 * hidden, 3 * hidden, 5 * hidden)
    else:
        activation = Stream("activation", 2 * hidden, 3 * hidden, 2 * hidden, 3 * hidden)
    return Work((*into, out), (), (activation,))


def convolution(channels: int, taps: int) -> Stream:
    """A short causal convolution and its SiLU. As it stands each tap reads and writes in fp32."""
    reach = taps - 1
    # Forward: pad 2, widen 3, first tap 4, later taps 6 each (and 4 where documents are masked), narrow 3, SiLU 2.
    forward = 2 + 3 + 4 + 10 * reach + 3 + 2
    # Backward: SiLU 3, widen two 6, zeros 2; each tap masks 4, adds 6, multiplies 6 and sums 2; narrow 3.
    backward = 3 + 6 + 2 + 18 * taps + 3
    return Stream("convolutions", forward * channels, backward * channels, 2 * channels, 3 * channels)


def gate(channels: int) -> Stream:
    """`norm(x * silu(gate))`: SiLU 2 and 3, product 3 and 6, norm 2 and 3; fused 3 and 5."""
    return Stream("gated norms", 7 * channels, 12 * channels, 3 * channels, 5 * channels)


@dataclass(frozen=True, kw_only=True)
class AttentionLayer:
    """The shape of a Transformer's layer: what its work depends on.

    gated: three matrices of width x hidden in the feed-forward layer, not two. post_norm: a norm after each branch.
    """

    kernel: Kernel
    width: int
    heads: int
    key_heads: int
    hidden: int
    causal: bool = True
    gated: bool = True
    rotary: bool = False
    qk_norm: bool = False
    post_norm: bool = False
    layer_scale: bool = False

    def work(self) -> Work:
        head = self.width // self.heads
        queries, keys = self.heads * head, self.key_heads * head
        products = (
            Product("q, k and v", self.width, queries + 2 * keys, divided="outputs"),
            Product("attention, out", queries, self.width, divided="inputs"),
        )
        attention = Fused(self.kernel, per_key=2.0 * queries, head_width=head, causal=self.causal)
        # q, k and v in, the output out; backwards those and the gradient in, three gradients out. And the gradients of
        # q, k and v are put together.
        touched = queries + keys
        streams = [
            Stream("attention's inputs and outputs", 2 * touched, 6 * touched, 2 * touched, 4 * touched)
        ]
        if self.qk_norm:
            streams.append(norm(touched, name="norms of q and k", divided="features"))
        if self.rotary:
            # Widened 3, four products and two sums of halves in fp32 (18), put together 4, narrowed 3; and so back.
            streams.append(Stream("rotary embedding", 28 * touched, 28 * touched, 2 * touched, 2 * touched))
        for _ in range(2):
            streams += [norm(self.width), residual(self.width)]
            streams += [norm(self.width)] if self.post_norm else []
            streams += [scaled(self.width)] if self.layer_scale else []
        return Work(products, (attention,), tuple(streams)) + feed_forward(
            self.width, self.hidden, gated=self.gated
        )
