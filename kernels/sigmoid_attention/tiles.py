"""Block shapes of the Triton kernels, per (padded head width, whether the scores have edges or slopes, dtype).

Chosen without a GPU, from what the compiler makes of the candidates for Hopper (registers, shared memory,
blocks that fit one multiprocessor, instructions per weight) and the throughputs in README.md: an estimate until
`python -m benchmarks.attention --tune` has run on one, which prints these tables anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

Kernel = Literal["forward", "query gradient", "key gradient", "decode"]
WIDTHS = (16, 32, 64, 128, 256)
LARGEST_WIDTH = WIDTHS[-1]


@dataclass(frozen=True)
class Tile:
    """One program's share.

    polynomial: which form of the sigmoid (triton_math.weight). own_shared: whether the rows a program owns (of q,
    or of k and v in the key gradient) wait in shared memory; else in registers, which spares its bandwidth.
    split: whether dk and dv are computed one after the other, by a launch each.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    polynomial: bool = True
    own_shared: bool = False
    split: bool = False


HALF: dict[Kernel, dict[int, Tile]] = {
    "forward": {
        16: Tile(128, 64, 8, 3),
        32: Tile(128, 64, 8, 3),
        64: Tile(128, 64, 8, 3),
        128: Tile(128, 128, 8, 2, own_shared=True),
        256: Tile(128, 64, 8, 2),
    },
    "query gradient": {
        16: Tile(128, 64, 8, 2),
        32: Tile(128, 64, 8, 2),
        64: Tile(128, 64, 8, 2, own_shared=True),
        128: Tile(128, 64, 8, 2, own_shared=True),
        256: Tile(64, 32, 8, 2, own_shared=True),
    },
    "key gradient": {
        16: Tile(64, 128, 8, 2),
        32: Tile(64, 128, 8, 2),
        64: Tile(64, 128, 8, 2, own_shared=True),
        128: Tile(64, 128, 8, 2, own_shared=True),
        256: Tile(32, 64, 4, 2, own_shared=True, split=True),
    },
    "decode": {**{width: Tile(16, 64, 4, 3) for width in WIDTHS}, 256: Tile(16, 32, 4, 3)},
}
"""bf16 and fp16, which compile alike."""
EDGES: dict[tuple[Kernel, int], Tile] = {
    ("key gradient", 128): Tile(32, 128, 8, 2, own_shared=True),  # at 64 rows masked steps and slopes spill
}
"""Where half precision takes another shape when some steps are masked (causal, windowed or packed) or under ALiBi."""
DECODE_ROWS = (16, 32, 64)
"""Rows of a decode, queries by heads of a group; what has more rows is a forward pass."""
SINGLE_WIDTHS = (16, 32, 64, 128)
_ROWS = Tile(64, 32, 4, 2, polynomial=False, own_shared=True)
_KEYS = Tile(32, 64, 4, 2, polynomial=False, own_shared=True)
SINGLE: dict[Kernel, dict[int, Tile]] = {
    "forward": dict.fromkeys(SINGLE_WIDTHS, _ROWS),
    "query gradient": dict.fromkeys(SINGLE_WIDTHS, _ROWS),
    "key gradient": {**dict.fromkeys(SINGLE_WIDTHS, _KEYS), 128: replace(_KEYS, split=True)},
    "decode": dict.fromkeys(SINGLE_WIDTHS, Tile(16, 32, 4, 2, polynomial=False)),
}
"""fp32, computed in TF32. At 256 nothing fits the registers."""


def padded(width: int) -> int:
    """The width that a head width is computed at, one of WIDTHS: a matrix product takes powers of two."""
    return next(size for size in WIDTHS if size >= width)


def tile_for(kernel: Kernel, width: int, edges: bool, dtype: torch.dtype) -> Tile:
    """The table's entry for a padded width. `edges`: causal, windowed or packed, so that some steps are masked; or
    ALiBi, which takes as many registers."""
    if dtype == torch.float32:
        return SINGLE[kernel][width]
    tile = HALF[kernel][width]
    return EDGES.get((kernel, width), tile) if edges else tile


def decode_tile(tile: Tile, rows: int) -> Tile:
    """The table's decode for so many rows. Above 16 it takes twice the warps, without which wide heads spill."""
    fitting = next(size for size in DECODE_ROWS if size >= rows)
    return tile if fitting <= tile.rows else replace(tile, rows=fitting, warps=2 * tile.warps)
