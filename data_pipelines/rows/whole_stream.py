"""The endless rows of whole documents of one source, by number.

An epoch permutes the shards, the rows within a window of shards, and which of the documents of equal length takes
which slot. B rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.permutation import permutation
from data_pipelines.rows.cut_rows import OpenSource
from data_pipelines.rows.order import LruCache, Runs, expand, join_runs
from data_pipelines.rows.packed_shard import Items, PackedShard, WholeShard
from data_pipelines.storage.dataset import Shard
from data_pipelines.tokens.vocabulary import Vocabulary


@dataclass(frozen=True)
class RowWindow:
    """A few shards of one epoch. R rows in the epoch's order."""

    shards: tuple[PackedShard, ...]
    numbers: tuple[int, ...]  # of the shards in the split
    shard_R: np.ndarray  # number in `shards`
    row_R: np.ndarray  # number in the shard
    item_of_slot: tuple[np.ndarray, ...]  # for each shard: which item takes which slot, this epoch


class WholeStream:
    """Random access to the endless rows of one source.

    Args:
        source: an opened source.
        vocabulary: of the run.
        length: T.
        key: what the order depends on; None for the stored order.
        window_shards: how many shards are shuffled together.
    """

    def __init__(
        self,
        source: OpenSource,
        vocabulary: Vocabulary,
        length: int,
        key: tuple[object, ...] | None,
        window_shards: int,
    ) -> None:
        if window_shards < 1:
            raise DataError(f"window_shards is {window_shards}; it must be at least 1.")
        self._key, self._window_shards = key, window_shards
        dataset, split = source.dataset, source.dataset.split(source.split)
        text_only = dataset.ranges is None
        self._shards = [WholeShard(Shard(dataset, r), vocabulary, text_only, length) for r in split.shards]
        self._shard_rows = np.asarray([shard.rows() for shard in self._shards], np.int64)
        self.rows = int(self._shard_rows.sum())  # of one epoch
        self.tokens = split.tokens
        self._epochs: LruCache[tuple[np.ndarray, np.ndarray]] = LruCache(2)
        self._windows: LruCache[RowWindow] = LruCache(3)
        self._packed: LruCache[PackedShard] = LruCache(window_shards)

    def runs(self, numbers: np.ndarray) -> Runs:
        """The documents of rows, one interval for each of `numbers`, which are counted over all epochs.

        Raises:
            DataError: a member is damaged or holds what its vocabulary does not allow.
        """
        window_of = [self._window_at(number) for number in numbers.tolist()]
        runs, intervals = [], []
        for window in {id(window): window for window, _ in window_of}.values():
            mine = np.asarray([i for i, (other, _) in enumerate(window_of) if other is window])
            places = np.asarray([window_of[i][1] for i in mine])
            for shard in np.unique(window.shard_R[places]).tolist():
                here = np.flatnonzero(window.shard_R[places] == shard)
                runs.append(self._shard_runs(window, shard, window.row_R[places[here]]))
                intervals.append(mine[here])
        return join_runs(runs, intervals)

    def documents(self, number: int) -> list[tuple[int, int, int, int]]:
        """(epoch, document in the split, its first token, tokens) of what is in a row."""
        window, place = self._window_at(number)
        shard = int(window.shard_R[place])
        _, items = _slots_of(window, shard, window.row_R[[place]])
        numbers = window.numbers[shard]
        documents_before = sum(s.shard.record.documents for s in self._shards[:numbers])
        table, epoch = window.shards[shard].items, number // self.rows
        return [
            (
                epoch,
                documents_before + int(table.document_I[i]),
                int(table.within_I[i]),
                int(table.length_I[i]),
            )
            for i in items.tolist()
        ]

    def _shard_runs(self, window: RowWindow, shard: int, row_B: np.ndarray) -> Runs:
        packed = window.shards[shard]
        slots, items = _slots_of(window, shard, row_B)
        table = packed.items
        member = table.member_I[items]
        for number in np.unique(member).tolist():
            self._shards[window.numbers[shard]].check(packed.shard, number)
        count_B = packed.first_slot_R1[row_B + 1] - packed.first_slot_R1[row_B]
        return Runs(
            np.repeat(np.arange(len(row_B)), count_B),
            packed.place_S[slots],
            table.length_I[items],
            np.ones(len(items), np.bool_),
            table.start_I[items],
            member,
            np.zeros(len(items), np.int64),
            (packed.shard,),
        )

    def _window_at(self, number: int) -> tuple[RowWindow, int]:
        """The window of a row and the row's place in it."""
        epoch, offset = divmod(number, self.rows)
        order, starts = self._epochs.get(epoch, lambda: self._plan_epoch(epoch))
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        made = self._windows.get((epoch, window), lambda: self._make_window(epoch, order, window))
        return made, offset - int(starts[window])

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in this epoch's order, and the row that begins each window."""
        count, size = len(self._shards), self._window_shards
        order = np.arange(count) if self._key is None else permutation(count, *self._key, epoch, "shards")
        ends = np.cumsum(self._shard_rows[order])
        return order, np.append(0, ends[size - 1 :: size])

    def _make_window(self, epoch: int, order: np.ndarray, number: int) -> RowWindow:
        first = number * self._window_shards
        numbers = order[first : first + self._window_shards].tolist()
        shards = tuple(self._packed.get(n, self._shards[n].pack) for n in numbers)
        rows = [len(shard.first_slot_R1) - 1 for shard in shards]
        shard_R = np.repeat(np.arange(len(shards)), rows)
        row_R = expand(np.zeros(len(rows), np.int64), np.asarray(rows))
        if self._key is not None:
            shuffled = permutation(len(shard_R), *self._key, epoch, "window", number)
            shard_R, row_R = shard_R[shuffled], row_R[shuffled]
        items = tuple(self._assign(s.items, epoch, n) for s, n in zip(shards, numbers, strict=True))
        return RowWindow(shards, tuple(numbers), shard_R, row_R, items)

    def _assign(self, items: Items, epoch: int, shard: int) -> np.ndarray:
        """Which item takes which slot: items of equal length are permuted."""
        count = len(items.length_I)
        if self._key is None:
            return np.arange(count)
        return np.lexsort((permutation(count, *self._key, epoch, "items", shard), -items.length_I))


def _slots_of(window: RowWindow, shard: int, row_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places in `slot_S` of some rows of a shard, and the items that take them."""
    packed = window.shards[shard]
    first = packed.first_slot_R1[row_B]
    slots = expand(first, packed.first_slot_R1[row_B + 1] - first)
    return slots, window.item_of_slot[shard][packed.slot_S[slots]]
