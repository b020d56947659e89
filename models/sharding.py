"""How a weight splits over tensor-parallel ranks: data beside each model, with no ranks in it.

A table maps a module's name pattern (`*` stands for one component) to its split. Modules that no pattern
names (norms) are replicated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


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


Split = Column | Row | Vocab | Channels
