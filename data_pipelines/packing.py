"""From runs of tokens to the tensors of a batch: documents end to end, cut at the row's length. B rows, T
time."""

from __future__ import annotations

import numpy as np
import torch

from data_pipelines.batch import Batch, Cursor
from data_pipelines.errors import DataError
from data_pipelines.order import Runs

MOST_READS = 4
"""Of a batch whose shards change while it is read."""


def pack(runs: Runs, rows: np.ndarray, length: int, pad: int, cursor: Cursor) -> Batch:
    """Build a batch from the runs that fill intervals of T + 1 tokens, one interval for each row.

    A row's last token is only a target: it is the first token of the source's next row. Where the runs of a
    row end early, the row is filled with `pad` and weighs nothing there.

    Args:
        runs: sorted by interval (= place in the batch) and place.
        rows: (B,) numbers of the rows.
        length: T.
        pad: a token id.
    """
    count = len(rows)
    tokens = gather(runs)
    filled_B = None  # tokens of each row, if some end early
    if len(tokens) < count * (length + 1):
        filled_B = np.bincount(runs.interval_R, runs.length_R, count).astype(np.int64)
        tokens = _padded(tokens, filled_B, length + 1, pad)
    weights, cuts = _borders(runs, count, length)
    if filled_B is not None:
        # The last token of such a row has no target.
        weights &= (np.arange(1, length + 1) < filled_B[:, None]).reshape(-1)
        early = (filled_B > 0) & (filled_B < length)
        cuts = np.concatenate([cuts, (np.arange(count) * length + filled_B)[early]])
    segments, positions = segments_and_positions(cuts, count, length)
    return Batch(
        sequences=torch.from_numpy(tokens.astype(np.int64).reshape(count, length + 1)),
        weights=torch.from_numpy(weights.reshape(count, length)),
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


def _padded(tokens: np.ndarray, filled_B: np.ndarray, width: int, pad: int) -> np.ndarray:
    """Fill rows that end early up to `width`; row b takes the next filled_B[b] tokens."""
    padded = np.full((len(filled_B), width), pad, tokens.dtype)
    padded[np.arange(width) < filled_B[:, None]] = tokens
    return padded


def _borders(runs: Runs, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The weights, (B T,) bool, and the places in the flat batch where segments begin, and its end."""
    weights = np.ones(count * length, np.bool_)
    # A document that begins at place p > 0 of a row is not to be predicted from the end of the one before.
    later = runs.begins_R & (runs.place_R > 0)
    place = runs.place_R[later]
    begins = runs.interval_R[later] * length + place
    weights[begins - 1] = False
    return weights, np.concatenate([np.arange(count + 1) * length, begins[place < length]])


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
