"""The rows of an evaluation: fixed, in stored order, each token scored once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines.batch import Batch, Cursor
from data_pipelines.errors import DataError
from data_pipelines.order import TokenStream, join_runs
from data_pipelines.packing import pack
from data_pipelines.rows import OpenSource


def evaluation_rows(sources: Sequence[OpenSource], sequence_length: int) -> int:
    """How many rows an evaluation has: the first token to be predicted in each source is its first one, and its last
    row is padded."""
    return sum(_rows_of(source, sequence_length) for source in sources)


def _rows_of(source: OpenSource, length: int) -> int:
    return -(-source.tokens // length)


def evaluation_batches(
    sources: Sequence[OpenSource],
    sequence_length: int,
    rows_per_batch: int,
    rank: int = 0,
    world: int = 1,
    limit_rows: int | None = None,
) -> Iterator[Batch]:
    """This rank's batches. All ranks get equally many of equal shape: missing rows are padding of weight 0.

    Args:
        rows_per_batch: rows of one rank's batch.
        limit_rows: at most so many rows over all ranks, from the beginning; None for all.
    """
    if rows_per_batch < 1 or sequence_length < 1:
        raise DataError(
            f"rows_per_batch {rows_per_batch} and sequence_length {sequence_length} must be positive."
        )
    streams = [TokenStream(source.dataset, source.split, None, 1) for source in sources]
    first = np.cumsum([0, *(_rows_of(source, sequence_length) for source in sources)])
    total = int(first[-1]) if limit_rows is None else min(int(first[-1]), limit_rows)
    group = rows_per_batch * world
    for begin in range(0, total, group):
        mine = np.arange(begin + rank * rows_per_batch, begin + (rank + 1) * rows_per_batch)
        yield _batch(streams, first, mine, total, (sequence_length, sources[0].dataset.eot))


def _batch(
    streams: Sequence[TokenStream], first: np.ndarray, rows: np.ndarray, total: int, shape: tuple[int, int]
) -> Batch:
    """The rows that exist from their streams, the others empty. `shape`: T and the end-of-text token's id."""
    length, eot = shape
    source = np.searchsorted(first, rows, side="right") - 1
    parts, places = [], []
    for number in np.unique(source[rows < total]).tolist():
        place = np.flatnonzero((source == number) & (rows < total))
        stream = streams[number]
        begin = (rows[place] - first[number]) * length - 1  # with the token before the row
        parts.append(stream.runs(begin, length + 1, stream.tokens))
        places.append(place)
    runs = join_runs(parts, places) if parts else streams[0].nothing()
    return pack(runs, rows, length, eot, Cursor(min(int(rows[-1]) + 1, total), "evaluation"))
