"""How a weight splits over tensor-parallel ranks: data beside each model, with no ranks in it.

A table maps a module's name pattern (`*` stands for one component) to its split. Modules that no pattern
names (norms) are replicated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Column:
    """The output features (rows of the weight) are divided over the ranks.

    `by="heads"` marks a fused projection of stacked segments, as long as the config's `qkv_features` says: each
    segment (q, k, v) is divided by itself, in whole heads, and a rank holds its part of each, in order. The
    layer's `out_features` must then be the rank's own.
    """

    by: Literal["features", "heads"] = "features"


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
