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
    buffer = gather(runs, count, length + 1, pad)
    tokens = buffer[:, :-1].astype(np.int64)
    targets = buffer[:, 1:].astype(np.int64)
    weights = np.ones(count * length, np.float32)
    # A document that begins at place p > 0 of a row is not to be predicted from the end of the one before.
    begins = runs.begins_R & (runs.place_R > 0)
    weights[runs.interval_R[begins] * length + runs.place_R[begins] - 1] = 0.0
    filled = np.bincount(runs.interval_R, runs.length_R, count).astype(np.int64)
    short = np.flatnonzero(filled <= length)
    for row in short.tolist():  # only the last rows of an evaluation
        weights[row * length + max(0, int(filled[row]) - 1) : (row + 1) * length] = 0.0
    segments, positions = _segments(runs, filled, count, length)
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights.reshape(count, length)),
        segment_ids=torch.from_numpy(segments),
        positions=torch.from_numpy(positions),
        rows=torch.from_numpy(rows.astype(np.int64)),
        cursor=cursor,
    )


def gather(runs: Runs, count: int, width: int, pad: int) -> np.ndarray:
    """Copy the tokens of `runs` into (count, width), in the type they are stored in. Members are checked
    first."""
    for number in np.unique(runs.shard_R).tolist():
        here = runs.shard_R == number
        runs.shards[number].check(runs.start_R[here])
    sources = [shard.tokens for shard in runs.shards]
    kind = sources[0].dtype if sources else np.dtype(np.uint16)
    buffer = np.empty(count * width, kind)
    if int(runs.length_R.sum()) < buffer.size:
        buffer.fill(pad)
    place = (runs.interval_R * width + runs.place_R).tolist()
    starts, shards, lengths = runs.start_R.tolist(), runs.shard_R.tolist(), runs.length_R.tolist()
    for to, shard, start, size in zip(place, shards, starts, lengths, strict=True):
        buffer[to : to + size] = sources[shard][start : start + size]
    return buffer.reshape(count, width)


def _segments(runs: Runs, filled: np.ndarray, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions, (B, T) int32 each. A segment begins where a row or a document does, and
    where padding begins."""
    rows = np.arange(count)
    starts_here = (runs.begins_R & (runs.place_R < length)) & (runs.place_R > 0)
    documents = runs.interval_R[starts_here] * length + runs.place_R[starts_here]
    padding = (rows * length + filled)[(filled > 0) & (filled < length)]
    cuts = np.concatenate([rows * length, documents, padding])
    cuts.sort()
    sizes = np.diff(np.append(cuts, count * length))
    number = np.arange(len(cuts)) - np.searchsorted(cuts, cuts // length * length)
    positions = np.repeat(cuts.astype(np.int32), sizes)
    np.subtract(np.arange(count * length, dtype=np.int32), positions, out=positions)
    segments = np.repeat(number.astype(np.int32), sizes)
    return segments.reshape(count, length), positions.reshape(count, length)
