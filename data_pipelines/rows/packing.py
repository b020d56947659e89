"""From runs of tokens to the tensors of a batch: documents end to end, cut at the row's length. B rows, T
time."""

from __future__ import annotations

import numpy as np
import torch

from data_pipelines.errors import DataError
from data_pipelines.rows.order import Runs, expand
from data_pipelines.stream.batch import Batch, Cursor

MOST_READS = 4
"""Of a batch whose shards change while it is read."""


def pack(runs: Runs, rows: np.ndarray, length: int, eot: int, cursor: Cursor) -> Batch:
    """Build a batch from the runs that fill intervals of T + 1 tokens, one interval for each row.

    The first token of an interval is the one before the row: what the row's first token is predicted from, and not
    itself a target. The documents of a stream follow each other, so before a document lies the end-of-text of
    another: each document is predicted from an end-of-text token on, its first token included. Where nothing lies
    before a row, or its runs end early, the row is filled with end-of-text, which weighs nothing at the end.

    Args:
        runs: sorted by interval (= place in the batch) and place.
        rows: (B,) numbers of the rows.
        length: T.
        eot: the end-of-text token's id.

    Raises:
        DataError: a member is damaged, or a document does not end with end-of-text.
    """
    count = len(rows)
    tokens = gather(runs)
    weights = np.ones((count, length), np.bool_)
    # A document whose first token lies at place p begins with the end-of-text at p - 1.
    later = runs.begins_R & (runs.place_R > 1)
    begins = [np.arange(count + 1) * length, runs.interval_R[later] * length + runs.place_R[later] - 1]
    if len(tokens) < count * (length + 1):
        tokens = _filled(tokens, runs, count, length + 1, eot)
        end_B = np.zeros(count, np.int64)  # tokens of each row, with what is before it
        np.maximum.at(end_B, runs.interval_R, runs.place_R + runs.length_R)
        weights &= np.arange(1, length + 1) < end_B[:, None]  # the last token has no target
        early = (end_B > 1) & (end_B <= length)
        begins.append((np.arange(count) * length + end_B - 1)[early])
    _check_ends(tokens, runs, length + 1, eot)
    segments, positions = segments_and_positions(np.concatenate(begins), count, length)
    return Batch(
        sequences=torch.from_numpy(tokens.astype(np.int64).reshape(count, length + 1)),
        weights=torch.from_numpy(weights),
        segment_ids=torch.from_numpy(segments),
        positions=torch.from_numpy(positions),
        rows=torch.from_numpy(rows.astype(np.int64)),
        cursor=cursor,
    )


def gather(runs: Runs) -> np.ndarray:
    """Copy the tokens of `runs` one after the other, in the type they are stored in.

    Each member is checked when its first run is copied, and again once its shard's file has changed: what is returned
    was read from files that were the same before and after.

    Raises:
        DataError: a member is damaged, or a shard is written to again and again.
    """
    if not runs.shards:
        return np.empty(0, np.uint16)
    for _ in range(MOST_READS):
        tokens = _copy(runs)
        changed = [shard for shard in runs.shards if shard.has_changed()]
        if not changed:
            return tokens
        for shard in changed:
            shard.follow()
    raise DataError(f"{changed[0].path}: it is written to while it is read; let that end first.")


def _copy(runs: Runs) -> np.ndarray:
    if any(0 in shard.checked for shard in runs.shards):
        _check(runs)
    buffers = [shard.token_buffer for shard in runs.shards]
    columns = (runs.shard_R, runs.start_R, runs.start_R + runs.length_R)
    # A row is made of short runs, and slices of memoryviews cost half of what slices of arrays do.
    parts = [buffers[s][a:b] for s, a, b in zip(*(column.tolist() for column in columns), strict=True)]
    return np.frombuffer(b"".join(parts), runs.shards[0].tokens.dtype)


def _check(runs: Runs) -> None:
    """Check the members that `runs` touches for the first time."""
    for shard, member in zip(runs.shard_R.tolist(), runs.member_R.tolist(), strict=True):
        if not runs.shards[shard].checked[member]:
            runs.shards[shard].check(member)


def _check_ends(tokens: np.ndarray, runs: Runs, width: int, eot: int) -> None:
    """What lies before a document must be an end-of-text, or the document would be predicted from another.

    Raises:
        DataError: a document does not end with one, with its shard.
    """
    later = np.flatnonzero(runs.begins_R & (runs.place_R > 0))
    wrong = tokens[runs.interval_R[later] * width + runs.place_R[later] - 1] != eot
    if wrong.any():
        shard = runs.shards[int(runs.shard_R[later[wrong.argmax()] - 1])]
        raise DataError(
            f"{shard.path}: a document does not end with the end-of-text token {eot}. Build the dataset again."
        )


def _filled(tokens: np.ndarray, runs: Runs, count: int, width: int, eot: int) -> np.ndarray:
    """The tokens of `runs` at their places in rows of `width`, end-of-text everywhere else; flat."""
    filled = np.full(count * width, eot, tokens.dtype)
    filled[expand(runs.interval_R * width + runs.place_R, runs.length_R)] = tokens
    return filled


def segments_and_positions(cuts: np.ndarray, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions, (B, T) each, from the places in the flat batch where segments begin, and its
    end, in any order."""
    kind = np.int16 if length <= 2**15 else np.int32  # half the work for what is as good for its readers
    cuts.sort()
    begins, sizes = cuts[:-1], cuts[1:] - cuts[:-1]
    row, place = np.divmod(begins, length)
    number = np.arange(len(begins)) - np.searchsorted(row, row)
    segments = np.repeat(number.astype(kind), sizes).reshape(count, length)
    positions = np.repeat(place.astype(kind), sizes).reshape(count, length)
    np.subtract(np.arange(length, dtype=kind), positions, out=positions)
    return segments, positions
