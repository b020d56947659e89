"""Rows of whole documents, for objectives that see a document from both sides: several documents in a row, none
cut (but text longer than a row), the rest padding.

Row g is a pure function of (seed, datasets, mixture, g): `packed_shard` packs the documents of a shard, `whole_stream`
orders the rows of a source, and here the sources are mixed. B rows, T time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from data_pipelines.errors import DataError
from data_pipelines.rows.cut_rows import OpenSource, RowSpan, order_fingerprint
from data_pipelines.rows.evaluation import shared_rows
from data_pipelines.rows.mixing import Mixture
from data_pipelines.rows.order import expand
from data_pipelines.rows.packing import gather, segments_and_positions
from data_pipelines.rows.shared_vocabulary import vocabulary_of
from data_pipelines.rows.whole_stream import WholeStream
from data_pipelines.stream.batch import Batch, Cursor


class WholeRowReader:
    """Reads rows of whole documents by number. Can be pickled; caches stay behind.

    Args:
        sources: from `open_sources`.
        sequence_length: T.
        seed: of the order.
        window_shards: how many shards are shuffled together.
        shuffle: False reads the rows in stored order.

    Raises:
        DataError: the datasets have no common vocabulary, or a pair is longer than T.
    """

    def __init__(
        self,
        sources: Sequence[OpenSource],
        sequence_length: int,
        seed: int,
        window_shards: int = 16,
        shuffle: bool = True,
    ) -> None:
        if sequence_length < 1:
            raise DataError(f"data.sequence_length is {sequence_length}; it must be at least 1.")
        self.sources = list(sources)
        self.vocabulary = vocabulary_of(self.sources)
        self.sequence_length, self.seed = sequence_length, seed
        self.mixture = Mixture([source.weight for source in self.sources])
        self._streams = [
            WholeStream(s, self.vocabulary, sequence_length, (seed, n) if shuffle else None, window_shards)
            for n, s in enumerate(self.sources)
        ]
        self.refused: dict[str, str] = {}
        self.fingerprint = order_fingerprint(
            # Raise the number if the order of rows ever changes.
            {"whole_order": 1, "vocabulary": self.vocabulary.fingerprint},
            self.sources,
            {
                "weights": self.mixture.weights,
                "sequence_length": sequence_length,
                "seed": seed,
                "window_shards": window_shards,
                "shuffle": shuffle,
            },
        )

    @property
    def rows_per_epoch(self) -> list[int]:
        """Rows of each source."""
        return [stream.rows for stream in self._streams]

    @property
    def padding_shares(self) -> list[float]:
        """Which share of each source's rows is padding."""
        return [1 - s.tokens / (s.rows * self.sequence_length) for s in self._streams]

    @property
    def padding_share(self) -> float:
        """Which share of the mixture's tokens is padding."""
        weights = self.mixture.weights
        return sum(w * p for w, p in zip(weights, self.padding_shares, strict=True)) / sum(weights)

    def batch(self, rows: Sequence[int], cursor: Cursor | None = None) -> Batch:
        """The rows with these numbers, in this order.

        Args:
            cursor: what the batch carries; by default the state after the highest of these rows.

        Raises:
            DataError: a member is damaged, or its documents are not what the vocabulary allows.
        """
        numbers = np.asarray(rows, np.int64)
        assert numbers.ndim == 1 and len(numbers) and numbers.min() >= 0, f"row numbers {rows}"
        cursor = cursor or Cursor(int(numbers.max()) + 1, self.fingerprint)
        source, draw = self.mixture.draws(numbers)
        return _batch(
            self._streams, source, draw, numbers, (self.sequence_length, self.vocabulary.pad, cursor)
        )

    def documents(self, row: int) -> list[RowSpan]:
        """Which documents are in a row, for tests and people."""
        source, draw = self.mixture.draws(np.asarray([row], np.int64))
        found = self._streams[int(source[0])].documents(int(draw[0]))
        return [RowSpan(int(source[0]), *span) for span in found]


def _batch(
    streams: Sequence[WholeStream],
    source_B: np.ndarray,
    draw_B: np.ndarray,
    rows_B: np.ndarray,
    form: tuple[int, int, Cursor],
) -> Batch:
    """Put rows of several sources together; rows of source -1 are empty. `form`: T, the padding's id, cursor."""
    length, pad, cursor = form
    count = len(rows_B)
    tokens = np.full((count, length + 1), pad, np.int64)
    filled_B = np.zeros(count, np.int64)
    cuts = [np.arange(count + 1) * length]
    for number in np.unique(source_B[source_B >= 0]).tolist():
        place = np.flatnonzero(source_B == number)
        runs = streams[number].runs(draw_B[place])
        filled = np.bincount(runs.interval_R, runs.length_R, len(place)).astype(np.int64)
        row, column = np.repeat(place, filled), expand(np.zeros_like(filled), filled)
        tokens[row, column] = gather(runs)
        filled_B[place] = filled
        inside = runs.place_R > 0
        cuts.append(place[runs.interval_R[inside]] * length + runs.place_R[inside])
    early = (filled_B > 0) & (filled_B < length)
    cuts.append((np.arange(count) * length + filled_B)[early])
    segments, positions = segments_and_positions(np.concatenate(cuts), count, length)
    return Batch(
        sequences=torch.from_numpy(tokens),
        weights=torch.from_numpy(np.arange(length) < filled_B[:, None]),
        segment_ids=torch.from_numpy(segments),
        positions=torch.from_numpy(positions),
        rows=torch.from_numpy(rows_B.astype(np.int64)),
        cursor=cursor,
    )


class WholeEvaluation:
    """The rows of an evaluation: in stored order, each document once, the sources side by side.

    Args:
        limit_rows: at most so many rows over all ranks; each source gives its first ones, in proportion to what it
            has and at least one where the limit allows. None for all.
    """

    def __init__(
        self, sources: Sequence[OpenSource], sequence_length: int, limit_rows: int | None = None
    ) -> None:
        if sequence_length < 1 or (limit_rows is not None and limit_rows < 1):
            raise DataError(
                f"data.sequence_length {sequence_length} and a limit of {limit_rows} rows must be positive."
            )
        self.vocabulary = vocabulary_of(sources)
        self._length = sequence_length
        self._streams = [WholeStream(s, self.vocabulary, sequence_length, None, 1) for s in sources]
        have = np.asarray([stream.rows for stream in self._streams], np.int64)
        self.all_rows = int(have.sum())
        """Without the limit."""
        take = shared_rows(have, limit_rows)
        source = np.repeat(np.arange(len(take)), take)
        draw = expand(np.zeros_like(take), take)
        order = np.lexsort((source, (draw + 0.5) / take[source]))  # evenly mixed
        self._source, self._draw = source[order], draw[order]

    @property
    def rows(self) -> int:
        """How many there are, over all ranks."""
        return len(self._source)

    def batches(self, rows_per_batch: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """This rank's batches. All ranks get equally many of equal shape: missing rows are padding of weight 0."""
        if rows_per_batch < 1:
            raise DataError(f"rows_per_batch {rows_per_batch} must be positive.")
        for begin in range(0, self.rows, rows_per_batch * world):
            rows = np.arange(begin + rank * rows_per_batch, begin + (rank + 1) * rows_per_batch)
            there = np.minimum(rows, self.rows - 1)
            source = np.where(rows < self.rows, self._source[there], -1)
            cursor = Cursor(min(int(rows[-1]) + 1, self.rows), "evaluation")
            form = (self._length, self.vocabulary.pad, cursor)
            yield _batch(self._streams, source, self._draw[there], rows, form)
