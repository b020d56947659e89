"""Block shapes of the Triton kernels, per (padded head width, whether the mask has edges, dtype).

Chosen without a GPU, from what the compiler makes of the candidates for Hopper (registers, shared memory,
blocks that fit one multiprocessor, instructions per weight) and the throughputs in README.md: an estimate until
`python -m benchmarks.attention --tune` has run on one, which prints these tables anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Kernel = Literal["forward", "query gradient", "key gradient", "decode"]
WIDTHS = (16, 32, 64, 128, 256)
LARGEST_WIDTH = WIDTHS[-1]


@dataclass(frozen=True)
class Tile:
    """One program's share. `polynomial`: which form of the sigmoid (triton_math.weight)."""

    rows: int
    keys: int
    warps: int
    stages: int
    polynomial: bool = True


# Half precision (bf16 and fp16 compile alike): 128 x 64 with 8 warps leaves room for two blocks at width 64.
HALF: dict[Kernel, dict[int, Tile]] = {
    "forward": {
        16: Tile(128, 64, 8, 3),
        32: Tile(128, 64, 8, 3),
        64: Tile(128, 64, 8, 3),
        128: Tile(128, 64, 8, 3),
        256: Tile(128, 64, 8, 2),
    },
    "query gradient": {
        16: Tile(128, 64, 8, 3),
        32: Tile(128, 64, 8, 3),
        64: Tile(128, 64, 8, 3),
        128: Tile(128, 64, 8, 2),
        256: Tile(64, 32, 8, 2),
    },
    "key gradient": {
        16: Tile(64, 128, 8, 3),
        32: Tile(64, 128, 8, 3),
        64: Tile(64, 128, 8, 3),
        128: Tile(64, 64, 8, 2),
        256: Tile(32, 64, 8, 2),
    },
    "decode": {width: Tile(16, 64, 4, 3) for width in WIDTHS},
}
FULL: dict[Kernel, dict[int, Tile]] = {
    "forward": {width: Tile(64, 32, 8, 2, polynomial=False) for width in WIDTHS},
    "query gradient": {width: Tile(64, 32, 8, 2, polynomial=False) for width in WIDTHS},
    "key gradient": {width: Tile(32, 64, 8, 2, polynomial=False) for width in WIDTHS},
    "decode": {width: Tile(16, 32, 4, 2, polynomial=False) for width in WIDTHS},
}


def padded(width: int) -> int:
    """The power of two that a head width is computed at; at least 16, which a matrix product needs."""
    return next(size for size in WIDTHS if size >= width)


def tile_for(kernel: Kernel, width: int, edges: bool, dtype: torch.dtype) -> Tile:
    """The table's entry for a padded width. `edges`: causal, windowed or packed, so that some steps are masked."""
    del edges  # no candidate was better for one of the two by the figures at hand
    return (FULL if dtype == torch.float32 else HALF)[kernel][width]
