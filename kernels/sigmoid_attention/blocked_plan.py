"""Cuts a call into tiles: row blocks, each against the keys its mask allows, for as many heads as fit a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.sigmoid_attention.problem import Problem

# Measured (benchmarks/attention_cpu.py): two score buffers of this many fp32 elements stay in a 1 MiB L2.
CPU_TILE_ELEMENTS = 256 * 1024
CPU_ROWS = 128
# On a GPU a tile must be large enough to fill the device; 1 GiB of fp32 scores bounds the memory.
CUDA_TILE_ELEMENTS = 256 * 1024 * 1024
CUDA_ROWS = 512


@dataclass(frozen=True)
class Tile:
    """Rows [row_start, row_end) against keys [key_start, key_end), for some batch elements and key heads.

    `mixed`: more than one segment meets in it.
    """

    batch_start: int
    batch_end: int
    head_start: int
    head_end: int
    row_start: int
    row_end: int
    key_start: int
    key_end: int
    mixed: bool

    @property
    def rows(self) -> int:
        return self.row_end - self.row_start

    @property
    def keys(self) -> int:
        return self.key_end - self.key_start

    @property
    def items(self) -> int:
        """Batch elements times key heads."""
        return (self.batch_end - self.batch_start) * (self.head_end - self.head_start)


@dataclass(frozen=True)
class Plan:
    tiles: list[Tile]
    complete: bool
    """Every row has a tile: none is without any visible key by position alone."""
    last_meets_all: bool
    """The last row block meets every key, in every batch element and head."""


@dataclass(frozen=True)
class _Reach:
    """The keys [first, last) that a row block of one batch element meets; `single`: its rows are one segment."""

    first: int
    last: int
    single: bool


def plan_tiles(problem: Problem, device: torch.device) -> Plan:
    on_cpu = device.type != "cuda"
    row_limit = max(1, (CPU_ROWS if on_cpu else CUDA_ROWS) // problem.group)
    # Each core works on its part of a tile, in a cache of its own.
    budget = CPU_TILE_ELEMENTS * torch.get_num_threads() if on_cpu else CUDA_TILE_ELEMENTS
    starts = list(range(0, problem.queries, row_limit))
    segments = _segment_reaches(problem, starts, row_limit)
    tiles: list[Tile] = []
    for block, row_start in enumerate(starts):
        row_end = min(row_start + row_limit, problem.queries)
        band = _band(problem, row_start, row_end)
        reaches = [_within(band, reach) for reach in segments[block]] if segments else [band] * problem.batch
        tiles.extend(_block_tiles(problem, (row_start, row_end), reaches, budget))
    rows = sum(tile.items * tile.rows for tile in tiles)
    final = [tile for tile in tiles if tile.row_end == problem.queries]
    return Plan(
        tiles=tiles,
        complete=rows == problem.batch * problem.key_heads * problem.queries,
        last_meets_all=problem.segments_BT is None
        and bool(final)
        and all((tile.key_start, tile.key_end) == (0, problem.keys) for tile in final),
    )


def _block_tiles(problem: Problem, rows: tuple[int, int], reaches: list[_Reach], budget: int) -> list[Tile]:
    """The tiles of one row block: batch elements and heads in groups whose scores fit the budget."""
    extent = max(reach.last for reach in reaches) - min(reach.first for reach in reaches)
    items = max(1, budget // ((rows[1] - rows[0]) * problem.group * max(1, extent)))
    batch_step = max(1, items // problem.key_heads)
    head_step = problem.key_heads if batch_step > 1 else min(items, problem.key_heads)
    tiles = []
    for batch_start in range(0, problem.batch, batch_step):
        batch_end = min(batch_start + batch_step, problem.batch)
        group = reaches[batch_start:batch_end]
        key_start, key_end = min(reach.first for reach in group), max(reach.last for reach in group)
        if key_end <= key_start:
            continue
        pure = all(reach.single and (reach.first, reach.last) == (key_start, key_end) for reach in group)
        for head_start in range(0, problem.key_heads, head_step):
            tile = Tile(
                batch_start=batch_start,
                batch_end=batch_end,
                head_start=head_start,
                head_end=min(head_start + head_step, problem.key_heads),
                row_start=rows[0],
                row_end=rows[1],
                key_start=key_start,
                key_end=key_end,
                mixed=problem.segments_BT is not None and not pure,
            )
            tiles.append(tile)
    return tiles


def _band(problem: Problem, row_start: int, row_end: int) -> _Reach:
    """The keys that causality and window leave to a row block."""
    first, last = 0, problem.keys
    if problem.left is not None:
        first = max(first, row_start + problem.offset - problem.left)
    if problem.right is not None:
        last = min(last, row_end + problem.offset + problem.right)
    return _Reach(min(first, problem.keys), max(last, 0), True)


def _within(band: _Reach, reach: _Reach) -> _Reach:
    return _Reach(max(band.first, reach.first), min(band.last, reach.last), reach.single)


def _segment_reaches(problem: Problem, starts: list[int], row_limit: int) -> list[list[_Reach]]:
    """Per row block and batch element, the keys that the segments leave. Empty without segments.

    Reading the ids would make the host wait for a GPU: there every key is kept and the mask alone decides.
    """
    ids_BT, key_ids_BS = problem.segments_BT, problem.key_segments_BS
    if ids_BT is None or key_ids_BS is None:
        return []
    if ids_BT.device.type != "cpu":
        return [[_Reach(0, problem.keys, False)] * problem.batch] * len(starts)
    ends = [min(start + row_limit, problem.queries) - 1 for start in starts]
    first_ids_BN, last_ids_BN = ids_BT[:, starts].contiguous(), ids_BT[:, ends].contiguous()
    first_keys = _transposed(torch.searchsorted(key_ids_BS.contiguous(), first_ids_BN))
    end_keys = _transposed(torch.searchsorted(key_ids_BS.contiguous(), last_ids_BN, right=True))
    single = _transposed(first_ids_BN == last_ids_BN)
    blocks = zip(first_keys, end_keys, single, strict=True)
    return [
        [_Reach(first, last, bool(one)) for first, last, one in zip(*block, strict=True)] for block in blocks
    ]


def _transposed(x_BN: Tensor) -> list[list[int]]:
    return [list(row) for row in x_BN.T.tolist()]
