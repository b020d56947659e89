"""How a weight splits over tensor-parallel ranks: what a module declares of its layers, with no ranks in it.

Layers of which nothing is declared (norms) are replicated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Column:
    """The output features (rows of the weight) are divided over the ranks.

    stacked: of a fused projection, how long the segments are that lie in it one after the other (q, k, v): each is
        divided by itself, in whole heads, and a rank holds its part of each, in order. The layer's `out_features`
        is then the rank's own. None: one segment.
    """

    stacked: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Row:
    """The input features (columns of the weight) are divided; the ranks' outputs are summed."""


@dataclass(frozen=True)
class Vocab:
    """The vocabulary (rows of the weight) is divided, for an embedding or a head."""


@dataclass(frozen=True)
class Channels:
    """A layer that never multiplies one channel by another's weight (a convolution in time, a recurrent cell).

    dimensions: by the parameter's name in the layer, which of its dimensions counts channels or heads, and is
        divided over the ranks.
    """

    dimensions: Mapping[str, int]


@dataclass(frozen=True)
class Shared:
    """Every rank holds all of a layer that works on the rank's own channels or heads (a norm within heads).

    Its gradient is the sum of the ranks' gradients.
    """


Split = Column | Row | Vocab | Channels | Shared


@dataclass(frozen=True)
class Part:
    """Which part of a divided layer a module is to be: the `number`-th of `of`.

    add_up: sums a tensor over the parts, in place, and returns it; outside of autograd.
    """

    number: int
    of: int
    add_up: Callable[[Tensor], Tensor]


@runtime_checkable
class Divisible(Protocol):
    """A module that must know that it is a part, because it tells sizes or sums over channels."""

    def take_part(self, part: Part) -> None:
        """Tell sizes, and compute, as this part. Whoever calls it divides the weights."""
        ...
