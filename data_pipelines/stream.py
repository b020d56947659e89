"""The batches of a run, read ahead in the background.

Every rank computes from the row counter alone which rows are its own, so the stream is the same for any
number of ranks and workers and any depth of prefetch, and its whole state is the cursor that travels with
the batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipelines.batch import Batch, Cursor
from data_pipelines.errors import DataError


class Rows(Protocol):
    """Rows by number: read from shards (`RowReader`), or drawn (`tasks.TaskRows`). Can be pickled."""

    fingerprint: str

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


SHARED_MEMORY = "/dev/shm"
POLL_S = 0.5
"""How often a consumer that waits looks up."""
STOP_AFTER_S, WAIT_LIMIT_S = 5.0, 1800.0
"""How long it waits at most, asked to stop and not."""


class Source(Protocol):
    """Where a stream's items come from."""

    def poll(self) -> Any:
        """The next item; None if none came in POLL_S. Raises StopIteration after the last one, DataError if none can
        come any more."""
        ...

    def describe(self) -> str:
        """Who should have delivered, for a message."""
        ...

    def close(self) -> None: ...


class Stream:
    """An iterator over batches, one for each optimizer step. Close it when done; it is a context manager
    too."""

    def __init__(self, source: Source) -> None:
        self._source: Source | None = source
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
        if isinstance(item, _Failure):
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


class _Failure:
    """An error on its way from a worker to the consumer, as the object it was."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Guarded(Dataset[Any]):
    """Hands errors on as values: a DataLoader would wrap them in a text with the worker's traceback.

    shares: put the batch where another process finds it. A DataLoader's worker does that later, in a thread whose
        errors nobody hears of: the batch is lost, and the consumer waits for ever.
    """

    def __init__(self, batches: StepBatches, *, shares: bool = False) -> None:
        self.batches, self.shares = batches, shares

    def __getitem__(self, step: int) -> Batch | _Failure:
        try:
            batch = self.batches[step]
            if self.shares:
                _share(batch)
            return batch
        except Exception as error:
            return _Failure(error)


def _share(batch: Batch) -> None:
    """Move a batch's tensors to shared memory. Raises DataError if there is no room."""
    tensors = list(_tensors_of(batch))
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except (RuntimeError, OSError) as error:
        needed = sum(tensor.nbytes for tensor in tensors)
        raise DataError(
            f"a data worker could not hand over a batch of {needed:,} bytes: {str(error).splitlines()[0]}. "
            f"{_shared_memory()}"
        ) from None


def _tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors_of(getattr(value, field.name))


def _shared_memory() -> str:
    """What room there is between processes, and how there is more."""
    room = "Workers pass batches through shared memory"
    with contextlib.suppress(OSError):
        stats = os.statvfs(SHARED_MEMORY)
        free, size = (count * stats.f_frsize for count in (stats.f_bavail, stats.f_blocks))
        room = f"{SHARED_MEMORY}, through which workers pass batches, has {free:,} bytes free of {size:,}"
    return (
        f"{room}: make it larger (`docker run --shm-size=8g`, `mount -o remount,size=8g {SHARED_MEMORY}`), remove what "
        "else lies there, or set data.workers=0, or fewer data.workers or data.prefetch_batches."
    )


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
    if start is not None and start.fingerprint != rows.fingerprint:
        raise DataError(
            f"the checkpoint's data cursor has fingerprint {start.fingerprint[:12]}, this run's data has "
            f"{rows.fingerprint[:12]}: the dataset, mixture, sequence length, window or seed changed. "
            "Restore them, or begin a new run."
        )
    if prefetch < 1 or workers < 0:
        raise DataError(f"prefetch {prefetch} must be at least 1 and workers {workers} at least 0.")
    keep_freed_memory()
    batches = StepBatches(rows, global_batch_rows, rank, world, start.row if start else 0)
    numbers = itertools.count() if steps is None else range(steps)
    if workers == 0:
        return Stream(_Prefetcher(_Guarded(batches), iter(numbers), prefetch, pin))
    return Stream(_Workers(_Guarded(batches, shares=True), numbers, workers, prefetch, pin))


class _Workers:
    """Processes that keep `prefetch` batches each ready."""

    def __init__(
        self, batches: _Guarded, numbers: Iterable[int], workers: int, prefetch: int, pin: bool
    ) -> None:
        try:
            self._iterator: Any = _loaded(batches, numbers, workers, prefetch, pin)
        except OSError as error:
            raise DataError(f"the data workers could not be started: {error}. {_shared_memory()}") from None
        self._processes = list(self._iterator._workers)

    def poll(self) -> Any:
        try:
            return next(self._iterator)
        except RuntimeError as error:  # of the loader itself: what goes wrong with a batch is a value
            text = str(error).splitlines()[0]
            if text.startswith("DataLoader timed out"):
                return None
            raise DataError(
                f"{text}. A worker that ends without a word was killed, or found no memory. {_shared_memory()}"
            ) from None

    def describe(self) -> str:
        states = (f"{p.pid} {'runs' if p.is_alive() else 'has ended'}" for p in self._processes)
        return f"data workers: {', '.join(states)}"

    def close(self) -> None:
        self._iterator = None  # which asks them to end, and waits for a while
        for process in self._processes:
            if process.is_alive():
                process.kill()  # they are deaf to SIGTERM, and Python would wait for them at its end
                process.join(timeout=5)


def _loaded(batches: _Guarded, numbers: Iterable[int], workers: int, prefetch: int, pin: bool) -> Any:
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
        timeout=POLL_S,
    )
    before = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # torch's handler raises the death of a worker wherever the main thread is; here it is found where a batch
        # is waited for, after those that are ready.
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return iterator


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
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


_END = object()


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
            item = self._item(step)
            if not self._put(item) or isinstance(item, _Failure):
                return
        self._put(_END)

    def _item(self, step: int) -> Batch | _Failure:
        item = self._batches[step]
        try:
            return item.pin_memory() if self._pin and isinstance(item, Batch) else item
        except RuntimeError as error:  # no page-locked memory is left
            return _Failure(error)

    def _put(self, item: Any) -> bool:
        """Wait for room; False if the stream was closed meanwhile."""
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def poll(self) -> Any:
        try:
            item = self._ready.get(timeout=POLL_S)
        except queue.Empty:
            if not self._thread.is_alive() and self._ready.empty():
                raise DataError("the thread that reads the data has ended without its batch.") from None
            return None
        if item is _END:
            raise StopIteration
        return item

    def describe(self) -> str:
        return f"the reading thread {'runs' if self._thread.is_alive() else 'has ended'}"

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stop.set()
        self._thread.join(timeout=30)
