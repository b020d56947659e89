"""The batches of a run, read ahead in the background.

Every rank computes from the row counter alone which rows are its own, so the stream is the same for any
number of ranks and workers and any depth of prefetch, and its whole state is the cursor that travels with
the batch.
"""

from __future__ import annotations

import itertools
import queue
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset

from data_pipelines.batch import Batch, Cursor
from data_pipelines.errors import DataError


class Rows(Protocol):
    """Rows by number: read from shards (`RowReader`), or drawn (`tasks.TaskRows`). Can be pickled."""

    fingerprint: str
    refused: dict[str, str]
    """Fingerprints of earlier versions' rows of the same data, and why a checkpoint of theirs is refused."""

    def batch(self, rows: Sequence[int], cursor: Cursor | None = None) -> Batch:
        """The rows with these numbers, in this order, carrying `cursor`."""
        ...


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


class Stream:
    """An iterator over batches, one for each optimizer step. Close it when done; it is a context manager
    too."""

    def __init__(self, source: Iterator[Any], close: Any) -> None:
        self._source, self._close = source, close
        self._waited = 0.0

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        try:
            item = next(self._source)
        finally:
            self._waited += time.perf_counter() - began
        if isinstance(item, _Failure):
            self.close()
            raise item.error
        assert isinstance(item, Batch)
        return item

    def take_wait_seconds(self) -> float:
        """Seconds that `next` has blocked the consumer since this was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """Stop the thread or the workers and wait for them."""
        self._close()
        self._source = iter(())  # what it held goes

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Failure:
    """An error on its way from a worker to the consumer, as the object it was."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Guarded(Dataset[Any]):
    """Hands errors on as values: a DataLoader would wrap them in a text with the worker's traceback."""

    def __init__(self, batches: StepBatches) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> Batch | _Failure:
        try:
            return self.batches[step]
        except Exception as error:
            return _Failure(error)


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
            f"{rows.fingerprint[:12]}: the dataset, mixture, sequence length, window or seed changed. "
            "Restore them, or begin a new run."
        )
    if prefetch < 1 or workers < 0:
        raise DataError(f"prefetch {prefetch} must be at least 1 and workers {workers} at least 0.")
    keep_freed_memory()
    batches = _Guarded(StepBatches(rows, global_batch_rows, rank, world, start.row if start else 0))
    numbers = itertools.count() if steps is None else range(steps)
    if workers == 0:
        thread = _Prefetcher(batches, iter(numbers), prefetch, pin)
        return Stream(iter(thread), thread.close)
    # Not fork: this process runs threads (prefetch, tokenizers, CUDA), and a forked child inherits their
    # locks in whatever state they are. Not forkserver: a signal that Slurm sends to every process of a job
    # would end the server, and the workers with it.
    loader: DataLoader[Any] = DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        prefetch_factor=prefetch,
        multiprocessing_context="spawn",
        worker_init_fn=_start_worker,
        pin_memory=pin,
    )
    # Dropping the loader's iterator stops its workers, and `Stream.close` drops it.
    return Stream(iter(loader), lambda: None)


def keep_freed_memory() -> None:
    """Have the C library keep the memory of freed batches for the next ones.

    glibc gives memory back to the kernel as soon as more than twice the size of the largest block freed so
    far is unused, and every batch then pays for fresh pages: more than for filling them. Freeing one block
    of just under 32 MiB, its upper bound for this rule (mallopt(3), M_MMAP_THRESHOLD), moves the limit; no
    page is touched.
    """
    np.empty(31 << 20, np.uint8)


def _start_worker(worker: int) -> None:
    keep_freed_memory()
    _ignore_signals()


def _ignore_signals() -> None:
    """Let workers outlive the signals that ask a run to stop: the run still wants its batches until it has
    saved, and then ends its workers by other means."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


class _Prefetcher:
    """A thread that keeps `depth` batches ready."""

    def __init__(self, batches: _Guarded, numbers: Iterator[int], depth: int, pin: bool) -> None:
        self._batches, self._numbers, self._pin = batches, numbers, pin
        self._ready: queue.Queue[Any] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="triptych-data", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        for step in self._numbers:
            item = self._batches[step]
            if self._pin and isinstance(item, Batch):
                item = item.pin_memory()
            if not self._put(item) or isinstance(item, _Failure):
                return
        self._put(None)

    def _put(self, item: Any) -> bool:
        """Wait for room; False if the stream was closed meanwhile."""
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Any]:
        while (item := self._ready.get()) is not None:
            yield item

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stop.set()
        self._thread.join(timeout=30)
