"""Best-fit decreasing: which rows hold which lengths.

The longest items go first, each into the row where it leaves the least room; a new row is opened where none has
room. The pattern depends on the multiset of lengths alone, so a shard has equally many rows in every epoch, and
counting them needs no look at the items. R rows, S slots (one for each item), U different lengths.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pattern:
    """The slots of all rows, in descending order of length."""

    rows: int
    row_S: np.ndarray  # int64
    place_S: np.ndarray  # where the slot begins in its row, int64


@dataclass(frozen=True)
class _Move:
    """`rows` rows that have `room` tokens left take `items` items of `length` each."""

    room: int
    rows: int
    items: int
    length: int


def count_rows(lengths: np.ndarray, capacity: int) -> int:
    """How many rows of `capacity` tokens hold items of these lengths (1 to capacity)."""
    return sum(move.rows for move in _moves(*_histogram(lengths), capacity) if move.room == capacity)


def best_fit(lengths: np.ndarray, capacity: int) -> Pattern:
    """The rows of `capacity` tokens that hold items of these lengths (1 to capacity)."""
    rows = 0
    with_room: dict[
        int, list[np.ndarray]
    ] = {}  # rows by the tokens they have left, those added last at the end
    row_parts, place_parts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for move in _moves(*_histogram(lengths), capacity):
        if move.room == capacity:
            taken = np.arange(rows, rows + move.rows)
            rows += move.rows
        else:
            taken = _take(with_room[move.room], move.rows)
        first = capacity - move.room
        row_parts.append(np.repeat(taken, move.items))
        place_parts.append(np.tile(first + move.length * np.arange(move.items), move.rows))
        with_room.setdefault(move.room - move.items * move.length, []).append(taken)
    return Pattern(rows, np.concatenate(row_parts), np.concatenate(place_parts))


def _histogram(lengths: np.ndarray) -> tuple[list[int], list[int]]:
    """The different lengths, the longest first, and how many items have each."""
    counts = np.bincount(lengths)
    values = np.flatnonzero(counts)[::-1]
    return values.tolist(), counts[values].tolist()


def _moves(lengths_U: list[int], counts_U: list[int], capacity: int) -> Iterator[_Move]:
    """The packing, many equal steps at a time.

    With `room` the least that fits, a row of that room is the best one again after every item that it takes,
    until nothing more fits: so each takes as many as it can before the next one.
    """
    rows_with: dict[int, int] = {}
    rooms: list[int] = []  # the keys of rows_with, ascending
    for length, waiting in zip(lengths_U, counts_U, strict=True):
        while waiting:
            place = bisect_left(rooms, length)
            room = rooms[place] if place < len(rooms) else capacity
            items = min(room // length, waiting)
            rows = waiting // items
            if place < len(rooms):
                rows = min(rows, rows_with[room])
                rows_with[room] -= rows
                if rows_with[room] == 0:
                    del rows_with[room]
                    rooms.pop(place)
            yield _Move(room, rows, items, length)
            waiting -= rows * items
            left = room - items * length
            if left:
                if left not in rows_with:
                    insort(rooms, left)
                rows_with[left] = rows_with.get(left, 0) + rows


def _take(parts: list[np.ndarray], count: int) -> np.ndarray:
    """Remove `count` rows from the end of `parts`."""
    found: list[np.ndarray] = []
    while count:
        last = parts.pop()
        if len(last) > count:
            parts.append(last[:-count])
            last = last[-count:]
        found.append(last)
        count -= len(last)
    return np.concatenate(found)
