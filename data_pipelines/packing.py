"""From runs of tokens to the tensors of a batch: documents end to end, cut at the row's length. B rows, T
time."""

from __future__ import annotations

import numpy as np
import torch

from data_pipelines.batch import Batch, Cursor
from data_pipelines.order import Runs


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
    full = int(runs.length_R.sum()) == count * (length + 1)
    buffer = gather(runs, count, length + 1, None if full else pad)
    weights = np.ones(count * length, np.float32)
    # A document that begins at place p > 0 of a row is not to be predicted from the end of the one before.
    later = runs.begins_R & (runs.place_R > 0)
    begins = (runs.interval_R * length + runs.place_R)[later]
    weights[begins - 1] = 0.0
    cuts = [np.arange(count) * length, begins[runs.place_R[later] < length]]
    if not full:
        cuts.append(_pad_weights(runs, weights, count, length))
    segments, positions = _segments(np.concatenate(cuts), count, length)
    return Batch(
        tokens=torch.from_numpy(buffer[:, :-1].astype(np.int64)),
        targets=torch.from_numpy(buffer[:, 1:].astype(np.int64)),
        weights=torch.from_numpy(weights.reshape(count, length)),
        segment_ids=torch.from_numpy(segments),
        positions=torch.from_numpy(positions),
        rows=torch.from_numpy(rows.astype(np.int64)),
        cursor=cursor,
    )


def gather(runs: Runs, count: int, width: int, pad: int | None) -> np.ndarray:
    """Copy the tokens of `runs` into (count, width), in the type they are stored in.

    Each member is checked when its first run is copied. `pad` fills what no run covers; None: they cover all.
    """
    kind = runs.shards[0].tokens.dtype if runs.shards else np.dtype(np.uint16)
    buffer = np.empty(count * width, kind)
    if pad is not None:
        buffer.fill(pad)
    sources = [(shard.tokens, shard.checked) for shard in runs.shards]
    place = (runs.interval_R * width + runs.place_R).tolist()
    columns = (runs.shard_R, runs.member_R, runs.start_R, runs.length_R)
    for to, shard, member, start, size in zip(place, *(column.tolist() for column in columns), strict=True):
        tokens, checked = sources[shard]
        if not checked[member]:
            runs.shards[shard].check(member)
        buffer[to : to + size] = tokens[start : start + size]
    return buffer.reshape(count, width)


def _pad_weights(runs: Runs, weights: np.ndarray, count: int, length: int) -> np.ndarray:
    """Set the weights of rows that end early (at the end of an evaluation) to 0 from their last token on, and
    return where padding begins after tokens."""
    filled = np.bincount(runs.interval_R, runs.length_R, count).astype(np.int64)
    for row in np.flatnonzero(filled <= length).tolist():
        weights[row * length + max(0, int(filled[row]) - 1) : (row + 1) * length] = 0.0
    return (np.arange(count) * length + filled)[(filled > 0) & (filled < length)]


def _segments(cuts: np.ndarray, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions, (B, T) int32 each, from the places in the flat batch where segments
    begin."""
    cuts.sort()
    sizes = np.diff(cuts, append=count * length)
    number = np.arange(len(cuts)) - np.searchsorted(cuts, cuts // length * length)
    positions = np.arange(count * length, dtype=np.int32)
    positions -= np.repeat(cuts.astype(np.int32), sizes)
    segments = np.repeat(number.astype(np.int32), sizes)
    return segments.reshape(count, length), positions.reshape(count, length)
