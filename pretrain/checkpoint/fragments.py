"""What an engine hands to the checkpoint: which ranges of which parameters it owns, as views."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

TENSOR_KINDS = ("master", "exp_avg", "exp_avg_sq")
"""The tensors kept for every parameter: the fp32 weight and Adam's two moments."""


class Segment(NamedTuple):
    """A run of `length` indices along a placement's dim: where it starts locally and in the plain tensor."""

    local_start: int
    global_start: int
    length: int


@dataclass(frozen=True)
class Placement:
    """Where a rank's local tensor lies in the plain model's tensor.

    Segments express every tensor-parallel layout in use: an even split is one segment, a fused [q; k; v]
    weight three, a padded vocabulary one whose length is clipped, and a rank that holds only padding has
    none.

    Attributes:
        shape: shape of the plain (unparallelised) model's tensor.
        dim: the dimension that is split, or None when every rank holds the whole tensor.
        segments: the pieces along `dim`; empty when `dim` is None.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    segments: tuple[Segment, ...] = ()

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Placement:
        """The placement of a tensor that is not split."""
        return cls(tuple(shape))


@dataclass(frozen=True)
class Fragment:
    """A contiguous range of one flattened local parameter that this rank owns.

    Attributes:
        name: the parameter's name in the plain model.
        local_shape: shape of the local (tensor-parallel) parameter.
        start: first element of the range within the flattened local parameter.
        tensors: 1-D float32 views of engine memory, all of one length, keyed by TENSOR_KINDS. Elements that
            lie beyond the local parameter are padding and are ignored.
        step: Adam's step count, one float32 element, shape () or (1,). Fragments may share one step tensor.
        placement: where the local parameter lies in the plain model's.
        is_saved: False for a copy of what another rank saves: it is loaded, and not written.
    """

    name: str
    local_shape: tuple[int, ...]
    start: int
    tensors: dict[str, Tensor]
    step: Tensor
    placement: Placement
    is_saved: bool = True

    @property
    def length(self) -> int:
        """Elements of the range that belong to the parameter, padding excluded."""
        owned = next(iter(self.tensors.values())).numel()
        return max(0, min(owned, math.prod(self.local_shape) - self.start))


@dataclass
class TrainingState:
    """All that one step's checkpoint holds.

    Attributes:
        fragments: this rank's parameters and optimizer state, as views.
        meta: JSON values, equal on all ranks (rank 0's are written): step, cursor, schedule, hooks' states,
            the resolved config, versions.
        rank_bytes: an opaque blob of this rank, such as its random state. It comes back only at the world
            size it was saved at; otherwise loading sets it to None.
    """

    fragments: list[Fragment]
    meta: dict[str, Any] = field(default_factory=dict)
    rank_bytes: bytes | None = None
