"""One shard's documents packed into rows by their lengths alone, so that it has equally many rows in every epoch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.rows.best_fit import Pattern, best_fit, count_rows
from data_pipelines.rows.order import expand
from data_pipelines.storage.dataset import OpenShard, Shard
from data_pipelines.tokens.document_form import check_pairs, check_text, member_documents
from data_pipelines.tokens.vocabulary import Vocabulary

_SHORTER = "Build the dataset again with shorter pairs."


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
