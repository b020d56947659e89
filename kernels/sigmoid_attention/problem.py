"""One call of sigmoid attention, as every form of it takes it.

Shape suffixes: B batch, T query time, S key time, H query heads, K key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

UNBOUNDED = -1
"""The side of a window that is open, in the list of integers that crosses torch's operator boundary."""


@dataclass(frozen=True)
class Problem:
    """Sizes, constants and masks of a call.

    Query i stands at position i + offset among the keys and sees key j if
    i + offset - left <= j <= i + offset + right (None: no bound) and both have the same segment id.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    key_heads: int
    width: int
    bias: float
    scale: float
    left: int | None
    right: int | None
    offset: int
    bias_H: Tensor | None = None  # instead of `bias`
    slopes_H: Tensor | None = None
    segments_BT: Tensor | None = None  # ids never decrease along a row
    key_segments_BS: Tensor | None = None  # given exactly if segments_BT is

    @property
    def group(self) -> int:
        return self.heads // self.key_heads


def problem_of(
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    constants: Sequence[float],
    band: Sequence[int],
    per_head: tuple[Tensor | None, Tensor | None] = (None, None),
    segments: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Problem:
    """The call described by what crosses the operator boundary.

    constants: bias and scale. band: left and right (UNBOUNDED or >= 0), and the offset.
    per_head: biases and slopes, each (H,) or None. segments: ids of queries and keys, or None twice.
    """
    batch, queries, heads, width = q_BTHD.shape
    keys, key_heads = k_BSKD.shape[1:3]
    left, right = (None if side == UNBOUNDED else side for side in band[:2])
    return Problem(
        batch=batch,
        queries=queries,
        keys=keys,
        heads=heads,
        key_heads=key_heads,
        width=width,
        bias=constants[0],
        scale=constants[1],
        left=left,
        right=right,
        offset=band[2],
        bias_H=per_head[0],
        slopes_H=per_head[1],
        segments_BT=segments[0],
        key_segments_BS=segments[1],
    )


def segment_intervals(ids_BT: Tensor, other_BS: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last position of `other` that has the id of each position of `ids`.

    Both (B, T) int32; equal where there is none. Ids must not decrease along a row. No host synchronisation.
    """
    ids, other = ids_BT.contiguous(), other_BS.contiguous()
    low = torch.searchsorted(other, ids, out_int32=True)
    return low, torch.searchsorted(other, ids, right=True, out_int32=True)
