"""Rows of whole documents, for objectives that see a document from both sides: several documents in a row, none
cut (but text longer than a row), the rest padding.

Row g is a pure function of (seed, datasets, mixture, g). The documents of a shard are packed by their lengths
alone (`best_fit`), so a shard has equally many rows in every epoch. An epoch permutes the shards, the rows within
a window of shards, and which of the documents of equal length takes which slot. B rows, T time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from data_pipelines.errors import DataError
from data_pipelines.permutation import permutation
from data_pipelines.rows.best_fit import Pattern, best_fit, count_rows
from data_pipelines.rows.cut_rows import OpenSource, RowSpan, order_fingerprint
from data_pipelines.rows.evaluation import shared_rows
from data_pipelines.rows.mixing import Mixture
from data_pipelines.rows.order import LruCache, Runs, expand, join_runs
from data_pipelines.rows.packing import gather, segments_and_positions
from data_pipelines.storage.dataset import OpenShard, Shard
from data_pipelines.stream.batch import Batch, Cursor
from data_pipelines.tokens.document_form import check_pairs, check_text, member_documents
from data_pipelines.tokens.vocabulary import Modality, Vocabulary, load_vocabulary


def vocabulary_of(sources: Sequence[OpenSource]) -> Vocabulary:
    """The one vocabulary of some datasets: of pairs, or of plain text with the same tokenizer.

    Raises:
        DataError: two vocabularies, a text tokenizer other than the vocabulary's, or a vocabulary.json that is not
            the one that dataset.json was written for.
    """
    found: tuple[Vocabulary, OpenSource] | None = None
    for source in sources:
        dataset, vocabulary = source.dataset, load_vocabulary(source.dataset.path)
        written = None if dataset.ranges is None else dataset.ranges["fingerprint"]
        if written != (None if vocabulary is None else vocabulary.fingerprint):
            raise DataError(
                f"{dataset.path / 'vocabulary.json'}: not the one that dataset.json was written for. Put the original "
                "file back, or build the dataset again."
            )
        if vocabulary is None:
            continue
        if found is not None and found[0] != vocabulary:
            raise DataError(
                f"{dataset.path} and {found[1].dataset.path} have different vocabularies, so equal ids mean different "
                f"things. Build one of them again with --vocabulary of the other."
            )
        found = (vocabulary, source)
    if found is None:
        entry = sources[0].dataset.tokenizer
        text = Modality("text", 0, int(entry["vocabulary"]), str(entry["fingerprint"]))
        return Vocabulary(text=text, eot=int(entry["eot"]))
    for source in sources:
        tokenizer = str(source.dataset.tokenizer["fingerprint"])
        if tokenizer != found[0].text.codec:
            raise DataError(
                f"{source.dataset.path} was built with tokenizer {tokenizer[:12]}, the vocabulary of "
                f"{found[1].dataset.path} has {found[0].text.codec[:12]}. Build it again with --tokenizer "
                f"{found[1].dataset.path}."
            )
    return found[0]


@dataclass(frozen=True)
class Items:
    """The documents of a shard, the longest first, or pieces of those that are longer than a row. I items."""

    start_I: np.ndarray  # tokens from the start of the shard's tar
    length_I: np.ndarray
    member_I: np.ndarray
    document_I: np.ndarray  # number in the shard
    within_I: np.ndarray  # where the item begins in its document


@dataclass(frozen=True)
class PackedShard:
    """An open shard and the rows of its items. R rows, S slots, sorted by row and place."""

    shard: OpenShard
    items: Items
    first_slot_R1: np.ndarray  # row r holds slots [first_slot[r], first_slot[r + 1])
    slot_S: np.ndarray  # number of the slot in descending order of length
    place_S: np.ndarray


@dataclass(frozen=True)
class RowWindow:
    """A few shards of one epoch. R rows in the epoch's order."""

    shards: tuple[PackedShard, ...]
    numbers: tuple[int, ...]  # of the shards in the split
    shard_R: np.ndarray  # number in `shards`
    row_R: np.ndarray  # number in the shard
    item_of_slot: tuple[np.ndarray, ...]  # for each shard: which item takes which slot, this epoch


@dataclass
class WholeShard:
    """One shard of a source, opened on demand."""

    shard: Shard
    vocabulary: Vocabulary
    text_only: bool
    capacity: int
    _checked: bytearray | None = field(
        default=None, repr=False
    )  # per member: 1 if its documents were found right

    def rows(self) -> int:
        """How many rows it has in every epoch.

        Raises:
            DataError: a pair is longer than a row.
        """
        length_P = self.shard.index().piece_length_P.astype(np.int64)
        if not self.text_only and length_P.max() > self.capacity:
            self._items(self.shard.open())  # looks which documents are pairs
        whole_P, rest_P = np.divmod(length_P, self.capacity)
        full = np.full(int(whole_P.sum()), self.capacity)
        return count_rows(np.concatenate([full, rest_P[rest_P > 0]]), self.capacity)

    def pack(self) -> PackedShard:
        """Open and pack it, in stored order."""
        opened = self.shard.open()
        items = self._items(opened)
        pattern: Pattern = best_fit(items.length_I, self.capacity)
        lowest_R = np.full(pattern.rows, len(items.length_I))
        np.minimum.at(lowest_R, pattern.row_S, items.document_I)
        row_S = np.argsort(np.argsort(lowest_R, kind="stable"))[pattern.row_S]  # rows by their first document
        order = np.lexsort((pattern.place_S, row_S))
        first_slot_R1 = np.searchsorted(row_S[order], np.arange(pattern.rows + 1))
        return PackedShard(opened, items, first_slot_R1, order, pattern.place_S[order])

    def check(self, opened: OpenShard, member: int) -> None:
        """Check a member's bytes and its documents, once.

        Raises:
            DataError: damage, or documents that the vocabulary does not allow, with shard and document.
        """
        if self._checked is None:
            self._checked = bytearray(opened.index.header.members)
        if self._checked[member]:
            return
        opened.check(member)
        documents = member_documents(opened, member)
        if self.text_only:
            check_text(documents, self.vocabulary.text.size)
        else:
            check_pairs(documents, self.vocabulary)
        self._checked[member] = 1

    def _items(self, opened: OpenShard) -> Items:
        index = opened.index
        length_P, start_P = index.piece_length_P.astype(np.int64), index.piece_start_P.astype(np.int64)
        first_D = index.first_piece_D1[:-1].astype(np.int64)
        pieces_D = index.first_piece_D1[1:].astype(np.int64) - first_D
        document_P = np.repeat(np.arange(len(first_D)), pieces_D)
        within_P = np.cumsum(length_P) - length_P
        within_P -= within_P[first_D[document_P]]
        if not self.text_only:
            self._refuse_long_pairs(opened, document_P, length_P)
        pieces_P = -(-length_P // self.capacity)
        piece = np.repeat(np.arange(len(length_P)), pieces_P)
        skipped = self.capacity * (expand(np.zeros_like(pieces_P), pieces_P))
        length = np.minimum(length_P[piece] - skipped, self.capacity)
        order = np.argsort(-length, kind="stable")
        piece, skipped = piece[order], skipped[order]
        return Items(
            start_P[piece] + skipped,
            length[order],
            opened.piece_members()[piece],
            document_P[piece],
            within_P[piece] + skipped,
        )

    def _refuse_long_pairs(self, opened: OpenShard, document_P: np.ndarray, length_P: np.ndarray) -> None:
        """Only text may be cut: look at the first token of documents that do not fit into a row."""
        pieces_D = np.bincount(document_P)
        length_D = np.bincount(document_P, length_P).astype(np.int64)
        for document in np.flatnonzero((length_D > self.capacity) | (pieces_D > 1)).tolist():
            piece = int(opened.index.first_piece_D1[document])
            token = int(opened.tokens[int(opened.index.piece_start_P[piece])])
            if token < self.vocabulary.first_special:
                continue
            self.check(opened, int(opened.piece_members()[piece]))  # damage is no pair
            length = int(length_D[document])
            what = f"{opened.path}: document {document} is a pair of {length} tokens"
            if pieces_D[document] > 1:
                raise DataError(f"{what}, cut over several members of the shard. {_SHORTER}")
            raise DataError(
                f"{what}, longer than data.sequence_length {self.capacity}, and pairs are not cut. Set "
                f"data.sequence_length to at least {length}, or leave such pairs out of the dataset."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checked": None}


_SHORTER = "Build the dataset again with shorter pairs."


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
