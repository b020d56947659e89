"""The batches of a run, read ahead in the background.

Every rank computes from the row counter alone which rows are its own, so the stream is the same for any
number of ranks and workers and any depth of prefetch, and its whole state is the cursor that travels with
the batch.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from torch.utils.data import Dataset

from data_pipelines.errors import DataError
from data_pipelines.stream.batch import Batch, Cursor
from data_pipelines.stream.read_ahead import Ahead, Failure, Guarded, Workers
from data_pipelines.stream.read_ahead import keep_freed_memory as keep_freed_memory


class Rows(Protocol):
    """Rows by number: read from shards (`RowReader`), or drawn (`tasks.TaskRows`). Can be pickled."""

    fingerprint: str
    refused: dict[str, str]
    """Fingerprints of earlier versions' rows of the same data, and why a checkpoint of theirs is refused."""

    def batch(self, rows: Sequence[int], cursor: Cursor | None = None) -> Batch:
        """The rows with these numbers, in this order, carrying `cursor`."""
        ...


def dealt_batches(
    rows: Rows, count: int, rows_per_batch: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """Rows 0 to `count`, for an evaluation, dealt to the ranks: all get equally many batches of equal shape, and a row
    that pads the last ones weighs nothing."""
    group = rows_per_batch * world
    for begin in range(0, count, group):
        first = begin + rank * rows_per_batch
        batch = rows.batch(range(first, first + rows_per_batch))
        batch.weights[batch.rows >= count] = False
        yield batch


class StepBatches(Dataset[Batch]):
    """Optimizer step -> this rank's batch. Step 0 is the first after `start`."""

    def __init__(self, rows: Rows, global_rows: int, rank: int, world: int, start: int) -> None:
        if global_rows < 1 or global_rows % world:
            raise DataError(
                f"a global batch of {global_rows} rows cannot be shared by {world} ranks: use a "
                f"multiple of {world}."
            )
        assert 0 <= rank < world, f"rank {rank} of {world}"
        self.rows, self.global_rows, self.start = rows, global_rows, start
        self.share = global_rows // world
        self.first = rank * self.share

    def __getitem__(self, step: int) -> Batch:
        begin = self.start + step * self.global_rows
        mine = range(begin + self.first, begin + self.first + self.share)
        return self.rows.batch(mine, Cursor(begin + self.global_rows, self.rows.fingerprint))


STOP_AFTER_S, WAIT_LIMIT_S = 5.0, 1800.0
"""How long it waits at most, asked to stop and not."""


class Stream:
    """An iterator over batches, one for each optimizer step. Close it when done; it is a context manager
    too."""

    def __init__(self, source: Ahead) -> None:
        self._source: Ahead | None = source
        self._waited = 0.0
        self._asked: Callable[[], bool] = lambda: False
        self._is_alone = True

    def stop_when(self, asked: Callable[[], bool], *, alone: bool) -> None:
        """Have `next` not wait for a batch that does not come, once the run was asked to stop.

        alone: no other rank waits for this one in the step to come: the stream then ends, as after its last batch,
            and the run can save. Else it fails.
        """
        self._asked, self._is_alone = asked, alone

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        try:
            item = self._wait(began)
        finally:
            self._waited += time.perf_counter() - began
        if isinstance(item, Failure):
            self.close()
            raise item.error
        assert isinstance(item, Batch)
        return item

    def _wait(self, began: float) -> Any:
        if self._source is None:
            raise StopIteration
        while (item := self._source.poll()) is None:
            seconds = time.perf_counter() - began
            if self._asked() and seconds > STOP_AFTER_S:
                if self._is_alone:
                    raise StopIteration
                raise DataError(
                    f"asked to stop, and no batch came in {seconds:.0f} s ({self._source.describe()}): the other ranks "
                    "are in a step that needs it, so nothing can be saved. The same command goes on from the last save"
                )
            if seconds > WAIT_LIMIT_S:
                raise DataError(
                    f"no batch came in {seconds:.0f} s ({self._source.describe()}): does the storage of data.path "
                    "answer? The same command goes on from the last save."
                )
        return item

    def take_wait_seconds(self) -> float:
        """Seconds that `next` has blocked the consumer since this was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """Stop the thread or the workers and wait for them."""
        source, self._source = self._source, None
        if source is not None:
            source.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_stream(
    rows: Rows,
    global_batch_rows: int,
    rank: int = 0,
    world: int = 1,
    start: Cursor | None = None,
    workers: int = 0,
    prefetch: int = 2,
    steps: int | None = None,
    pin: bool = False,
) -> Stream:
    """The batches of rank `rank` of `world`, from `start` on (None: from row 0).

    Args:
        workers: processes that read ahead; 0 reads in a thread of this process.
        prefetch: batches held ready (by each worker).
        steps: how many batches to deliver; None never ends.
        pin: deliver them in page-locked memory, for copies to a GPU that do not wait.

    Raises:
        DataError: `start` belongs to another run's data, or the rows cannot be shared by the ranks. Errors
            while reading come out of `next` as they were raised.
    """
    if start is not None and start.fingerprint in rows.refused:
        raise DataError(f"the checkpoint {rows.refused[start.fingerprint]}.")
    if start is not None and start.fingerprint != rows.fingerprint:
        raise DataError(
            f"the checkpoint's data cursor has fingerprint {start.fingerprint[:12]}, this run's data has "
            f"{rows.fingerprint[:12]}: the dataset, mixture, sequence length, window, data.shuffle_rows or seed "
            "changed. Restore them, or begin a new run."
        )
    if prefetch < 1 or workers < 0:
        raise DataError(f"prefetch {prefetch} must be at least 1 and workers {workers} at least 0.")
    keep_freed_memory()
    batches = StepBatches(rows, global_batch_rows, rank, world, start.row if start else 0)
    numbers = itertools.count() if steps is None else range(steps)
    if workers == 0:
        return Stream(Ahead(Guarded(batches).read(numbers, pin), prefetch))
    return Stream(Workers(Guarded(batches, shares=True), numbers, workers, prefetch, pin))
