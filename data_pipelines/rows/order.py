"""The endless token stream of one source: its documents in a shuffled order that is a pure function of the
seed.

Epoch after epoch, each epoch in a new order. The order has two levels, for disks: the shards are permuted,
taken in windows of a few shards, and the documents are permuted within a window. So a reader touches a few
shards at a time, and only the lengths of one window's documents are ever held in memory. The stream of a window
is cut into rows, and these are permuted too: otherwise a document longer than a row, perhaps all the text there
is, would be read from its beginning to its end.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.permutation import permutation
from data_pipelines.storage.dataset import Dataset, OpenShard, Shard

Value = TypeVar("Value")


class LruCache(Generic[Value]):
    """The last few values, by key. Thread-safe; a copy sent to another process starts empty."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of `key`, made now if it is not held."""
        with self._lock:
            if key not in self._values:
                while len(self._values) >= self._size:
                    self._values.popitem(last=False)
                self._values[key] = make()
            self._values.move_to_end(key)
            return self._values[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._size,)


@dataclass(frozen=True)
class EpochPlan:
    """The windows of one epoch: which shards, and where each begins. S shards, N windows."""

    shards_S: np.ndarray  # shard numbers in this epoch's order
    # First token of each window, counted from the epoch's start; last: the epoch's tokens.
    window_start_N1: np.ndarray


@dataclass(frozen=True)
class Window:
    """The documents of one window in this epoch's order, as P pieces (runs of tokens inside one member)."""

    shards: tuple[OpenShard, ...]
    shard_P: np.ndarray  # number in `shards`
    member_P: np.ndarray  # number in the shard
    start_P: np.ndarray  # tokens from the start of the shard's tar
    cumulative_P1: np.ndarray  # where each piece begins in the window's stream; last: the window's tokens
    document_P: np.ndarray  # number of the document in the split, in stored order
    within_P: np.ndarray  # where the piece begins in its document


@dataclass(frozen=True)
class Runs:
    """Runs of tokens that fill intervals of a stream. R runs, sorted by interval and place."""

    interval_R: np.ndarray  # which interval
    place_R: np.ndarray  # where the run begins in it
    length_R: np.ndarray
    begins_R: np.ndarray  # whether the run is the beginning of a document
    start_R: np.ndarray  # tokens from the start of the shard's tar
    member_R: np.ndarray  # number in the shard
    shard_R: np.ndarray  # number in `shards`
    shards: tuple[OpenShard, ...]


@dataclass(frozen=True)
class DocumentSpan:
    """A run of one document's tokens."""

    epoch: int
    document: int  # number in the split, in stored order
    first: int  # token of the document
    count: int


class TokenStream:
    """Random access to the endless stream of one source.

    Args:
        dataset: an opened dataset.
        split: the name of the split.
        key: what the order depends on (seed and source number); None for the stored order.
        window_shards: how many shards are shuffled together.
    """

    def __init__(
        self, dataset: Dataset, split: str, key: tuple[object, ...] | None, window_shards: int
    ) -> None:
        if window_shards < 1:
            raise DataError(f"window_shards is {window_shards}; it must be at least 1.")
        self.tokens = dataset.split(split).tokens  # of one epoch
        self._key, self._window_shards = key, window_shards
        self._shards = [Shard(dataset, record) for record in dataset.split(split).shards]
        records = dataset.split(split).shards
        self._shard_tokens = np.asarray([record.tokens for record in records], np.int64)
        documents = np.asarray([record.documents for record in records], np.int64)
        self._first_document = np.cumsum(documents) - documents
        self._epochs: LruCache[EpochPlan] = LruCache(2)
        self._windows: LruCache[Window] = LruCache(3)
        self._rows: LruCache[np.ndarray] = LruCache(2)
        # Opening checks a shard's size, probe and index. A small dataset's epochs are short, and all need the
        # same shards.
        self._opened: LruCache[OpenShard] = LruCache(window_shards)

    def runs(self, begin_I: np.ndarray, length: int, end: int | None = None) -> Runs:
        """Find the tokens of the intervals [begin, begin + length) of the stream, cut off at `end`.

        Args:
            begin_I: ascending starts, int64. Intervals may overlap, and begin before the stream: nothing is
                found there.
        """
        end_I = begin_I + length if end is None else np.minimum(begin_I + length, end)
        found: list[Runs] = []
        position, last = max(0, int(begin_I[0])), int(end_I[-1])
        while position < last:
            _, window, start = self._window_at(position)
            stop = start + int(window.cumulative_P1[-1])
            found.append(_runs_in_window(window, start, begin_I, end_I))
            later = begin_I[end_I > stop]
            position = max(stop, int(later[0])) if len(later) else last
        return found[0] if len(found) == 1 else join_runs(found, None)

    def shuffle_rows(self, row_B: np.ndarray, length: int) -> np.ndarray:
        """Which interval of `length` tokens each row takes: the intervals that begin in a window are permuted, so
        that the rows of a long document do not follow each other. (B,) int64, counted from the stream's start.

        The intervals of the stream themselves stay as they are, so each token still is in exactly one of them.
        """
        if self._key is None:
            return row_B
        interval_B = np.full_like(row_B, -1)
        while len(left := np.flatnonzero(interval_B < 0)):
            epoch, plan, number = self._window_number(int(row_B[left[0]]) * length)
            start, stop = plan.window_start_N1[number : number + 2] + epoch * self.tokens
            first, end = -(-int(start) // length), -(-int(stop) // length)
            order = self._row_order(epoch, number, end - first)
            here = left[(row_B[left] >= first) & (row_B[left] < end)]
            interval_B[here] = first + order[row_B[here] - first]
        return interval_B

    def documents(self, begin: int, length: int) -> list[DocumentSpan]:
        """The documents of the interval [begin, begin + length), for tests and people."""
        spans: list[DocumentSpan] = []
        position, end = begin, begin + length
        while position < end:
            epoch, window, start = self._window_at(position)
            piece = int(np.searchsorted(window.cumulative_P1, position - start, side="right")) - 1
            stop = min(end, start + int(window.cumulative_P1[piece + 1]))
            skipped = position - start - int(window.cumulative_P1[piece])
            document, within = int(window.document_P[piece]), int(window.within_P[piece]) + skipped
            spans.append(DocumentSpan(epoch, document, within, stop - position))
            position = stop
        return spans

    def _row_order(self, epoch: int, window: int, rows: int) -> np.ndarray:
        assert self._key is not None
        key = (*self._key, epoch, "rows", window)
        return self._rows.get((epoch, window, rows), lambda: permutation(rows, *key))

    def _window_at(self, position: int) -> tuple[int, Window, int]:
        """(epoch, window, where the window begins in the stream) of a token of the stream."""
        epoch, plan, number = self._window_number(position)
        window = self._windows.get((epoch, number), lambda: self._plan_window(epoch, plan, number))
        return epoch, window, epoch * self.tokens + int(plan.window_start_N1[number])

    def _window_number(self, position: int) -> tuple[int, EpochPlan, int]:
        """(epoch, its plan, number of the window in it) of a token of the stream."""
        epoch, offset = divmod(position, self.tokens)
        plan = self._epochs.get(epoch, lambda: self._plan_epoch(epoch))
        return epoch, plan, int(np.searchsorted(plan.window_start_N1, offset, side="right")) - 1

    def nothing(self) -> Runs:
        """No runs at all."""
        none = np.zeros(0, np.int64)
        return Runs(none, none, none, np.zeros(0, np.bool_), none, none, none, ())

    def _plan_epoch(self, epoch: int) -> EpochPlan:
        count = len(self._shards)
        shards = np.arange(count) if self._key is None else permutation(count, *self._key, epoch, "shards")
        ends = np.cumsum(self._shard_tokens[shards])
        last_of_window = np.append(np.arange(self._window_shards, count, self._window_shards), count) - 1
        return EpochPlan(shards, np.append(0, ends[last_of_window]))

    def _plan_window(self, epoch: int, plan: EpochPlan, number: int) -> Window:
        first = number * self._window_shards
        numbers = plan.shards_S[first : first + self._window_shards]
        shards = tuple(self._opened.get(n, self._shards[n].open) for n in numbers.tolist())
        documents = [shard.index.header.documents for shard in shards]
        order = np.arange(sum(documents))
        if self._key is not None:
            order = permutation(len(order), *self._key, epoch, "window", number)
        pieces = [shard.index.header.pieces for shard in shards]
        bases = np.cumsum([0, *pieces[:-1]])
        first_piece = np.concatenate(
            [s.index.first_piece_D1[:-1].astype(np.int64) + b for s, b in zip(shards, bases, strict=True)]
        )
        piece_count = np.diff(np.append(first_piece, sum(pieces)))
        split_document = np.concatenate(
            [self._first_document[n] + np.arange(d) for n, d in zip(numbers.tolist(), documents, strict=True)]
        )
        piece = expand(first_piece[order], piece_count[order])
        length = np.concatenate([s.index.piece_length_P for s in shards])[piece].astype(np.int64)
        cumulative = np.append(0, np.cumsum(length))
        document_start = np.cumsum(piece_count[order]) - piece_count[order]
        return Window(
            shards,
            np.repeat(np.arange(len(shards), dtype=np.int32), pieces)[piece],
            np.concatenate([shard.piece_members() for shard in shards])[piece],
            np.concatenate([s.index.piece_start_P for s in shards])[piece].astype(np.int64),
            cumulative,
            np.repeat(split_document[order], piece_count[order]),
            cumulative[:-1] - np.repeat(cumulative[document_start], piece_count[order]),
        )


def expand(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The concatenation of range(first[i], first[i] + count[i]) for all i."""
    before = np.cumsum(count) - count
    return np.repeat(first - before, count) + np.arange(int(count.sum()))


def _runs_in_window(window: Window, start: int, begin_I: np.ndarray, end_I: np.ndarray) -> Runs:
    """The runs of the intervals that lie in a window, whose stream begins at `start`."""
    size = int(window.cumulative_P1[-1])
    touched = np.arange(len(begin_I))
    if begin_I[0] < start or end_I[-1] > start + size:
        touched = np.flatnonzero((end_I > start) & (begin_I < start + size))
    low = np.maximum(begin_I[touched] - start, 0)
    high = np.minimum(end_I[touched] - start, size)
    first = np.searchsorted(window.cumulative_P1, low, side="right") - 1
    count = np.searchsorted(window.cumulative_P1, high, side="left") - first
    piece = expand(first, count)
    run_start, run_end = window.cumulative_P1[piece], window.cumulative_P1[piece + 1]
    after = np.cumsum(count)
    skipped = np.zeros(len(piece), np.int64)  # only the first run of an interval may begin inside its piece
    skipped[after - count] = low - run_start[after - count]
    run_start += skipped
    run_end[after - 1] = high
    return Runs(
        np.repeat(touched, count),
        run_start - np.repeat(begin_I[touched] - start, count),
        run_end - run_start,
        window.within_P[piece] + skipped == 0,
        window.start_P[piece] + skipped,
        window.member_P[piece],
        window.shard_P[piece],
        window.shards,
    )


def join_runs(several: list[Runs], intervals: list[np.ndarray] | None) -> Runs:
    """Put the runs of several windows or sources together and sort them by interval and place.

    Args:
        intervals: for each of them, the new numbers of its intervals; None keeps the numbers.
    """
    offsets = np.cumsum([0, *(len(one.shards) for one in several[:-1])])
    numbers = [
        p.interval_R if intervals is None else intervals[i][p.interval_R] for i, p in enumerate(several)
    ]
    columns = {
        name: np.concatenate([getattr(one, name) for one in several])
        for name in ("place_R", "length_R", "begins_R", "start_R", "member_R")
    }
    columns["interval_R"] = np.concatenate(numbers)
    columns["shard_R"] = np.concatenate([p.shard_R + o for p, o in zip(several, offsets, strict=True)])
    order = np.lexsort((columns["place_R"], columns["interval_R"]))
    shards = tuple(shard for one in several for shard in one.shards)
    return Runs(**{name: column[order] for name, column in columns.items()}, shards=shards)
