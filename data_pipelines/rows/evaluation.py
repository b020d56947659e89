"""The rows of an evaluation: fixed, in stored order, each token scored once; and the bytes of text that they hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.rows.cut_rows import OpenSource
from data_pipelines.rows.order import TokenStream, join_runs
from data_pipelines.rows.packing import gather, pack
from data_pipelines.stream.batch import Batch, Cursor

if TYPE_CHECKING:
    from data_pipelines.tokens.tokenizer import Tokenizer


def evaluation_rows(sources: Sequence[OpenSource], sequence_length: int) -> int:
    """How many rows an evaluation has: the first token to be predicted in each source is its first one, and its last
    row is padded."""
    return sum(_rows_of(source, sequence_length) for source in sources)


def shared_rows(have: np.ndarray, limit: int | None) -> np.ndarray:
    """How many rows of each source, which has so many, make up `limit`; all of them if they are fewer, or without a
    limit. In proportion to what each has, and at least one where the limit allows."""
    total = int(have.sum())
    if limit is None or total <= limit:
        return have
    exact = have * limit / total
    take = np.floor(exact).astype(np.int64)
    take[np.argsort(take - exact, kind="stable")[: limit - int(take.sum())]] += 1
    while limit >= len(have) and take.min() == 0:  # a source that would not be seen at all
        take[take.argmax()] -= 1
        take[take.argmin()] += 1
    return take


def _taken(sources: Sequence[OpenSource], sequence_length: int, limit_rows: int | None) -> np.ndarray:
    return shared_rows(
        np.asarray([_rows_of(source, sequence_length) for source in sources], np.int64), limit_rows
    )


def bytes_per_token(
    sources: Sequence[OpenSource], tokenizer: Tokenizer, sequence_length: int, limit_rows: int | None = None
) -> float | None:
    """UTF-8 bytes of text per token, end-of-text tokens counted, of the rows that `evaluation_batches` gives: what
    turns nats per token into bits per byte. None where these hold no text.

    Of a source of which only some rows are taken, their bytes are counted token by token; of a tokenizer whose tokens
    are not made of bytes, they are taken in proportion.
    """
    taken = _taken(sources, sequence_length, limit_rows).tolist()
    counts = [min(rows * sequence_length, s.tokens) for rows, s in zip(taken, sources, strict=True)]
    is_whole = all(count == source.tokens for count, source in zip(counts, sources, strict=True))
    lengths = None if is_whole else tokenizer.byte_lengths()  # a look at every id, for nothing
    text_bytes = 0.0
    for source, count in zip(sources, counts, strict=True):
        if count == source.tokens:
            text_bytes += source.text_bytes
        elif lengths is None:
            text_bytes += source.text_bytes * count / source.tokens
        elif count:
            stream = TokenStream(source.dataset, source.split, None, 1)
            text_bytes += int(lengths[gather(stream.runs(np.zeros(1, np.int64), count))].sum())
    return text_bytes / sum(counts) if text_bytes else None


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
        limit_rows: at most so many rows over all ranks: the first ones of each source, in proportion to what it has;
            None for all.
    """
    if rows_per_batch < 1 or sequence_length < 1:
        raise DataError(
            f"rows_per_batch {rows_per_batch} and sequence_length {sequence_length} must be positive."
        )
    streams = [TokenStream(source.dataset, source.split, None, 1) for source in sources]
    first = np.cumsum([0, *_taken(sources, sequence_length, limit_rows)])
    total = int(first[-1])
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
    found, places = [], []
    for number in np.unique(source[rows < total]).tolist():
        place = np.flatnonzero((source == number) & (rows < total))
        stream = streams[number]
        begin = (rows[place] - first[number]) * length - 1  # with the token before the row
        found.append(stream.runs(begin, length + 1, stream.tokens))
        places.append(place)
    runs = join_runs(found, places) if found else streams[0].nothing()
    return pack(runs, rows, length, eot, Cursor(min(int(rows[-1]) + 1, total), "evaluation"))
