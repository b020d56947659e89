"""Who reads batches before they are wanted: a thread, or processes with a thread that takes their batches in."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipelines.errors import DataError

SHARED_MEMORY = "/dev/shm"
POLL_S = 0.5
"""How often who waits looks up."""


class Failure:
    """An error on its way from a worker to the consumer, as the object it was."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class Batches(Protocol):
    """Optimizer step -> this rank's batch."""

    def __getitem__(self, step: int) -> Any: ...


class Guarded(Dataset[Any]):
    """Hands errors on as values: a DataLoader would wrap them in a text with the worker's traceback.

    shares: put the batch where another process finds it. A DataLoader's worker does that later, in a thread whose
        errors nobody hears of: the batch is lost, and the consumer waits for ever.
    """

    def __init__(self, batches: Batches, *, shares: bool = False) -> None:
        self.batches, self.shares = batches, shares

    def __getitem__(self, step: int) -> Any:
        try:
            batch = self.batches[step]
            if self.shares:
                _share(batch)
            return batch
        except Exception as error:
            return Failure(error)

    def read(self, numbers: Iterable[int], pin: bool) -> Iterator[Any]:
        """Batch after batch, in this process."""
        for step in numbers:
            item = self[step]
            yield item.pin_memory() if pin and not isinstance(item, Failure) else item


def _share(batch: Any) -> None:
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


class Ahead:
    """A thread that keeps `depth` items ready.

    items: batches, failures, and None where there is nothing yet.
    """

    def __init__(self, items: Iterator[Any], depth: int) -> None:
        self._items = items
        self._ready: queue.Queue[Any] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="triptych-data", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for item in self._items:
                if self._stop.is_set():
                    return
                if item is not None and (not self._put(item) or isinstance(item, Failure)):
                    return
            self._put(_END)
        except Exception as error:
            self._put(Failure(error))

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
        """The next item; None if none came in POLL_S. Raises StopIteration after the last one."""
        try:
            item = self._ready.get(timeout=POLL_S)
        except queue.Empty:
            return None
        if item is _END:
            raise StopIteration
        return item

    def describe(self) -> str:
        """Who should have delivered, for a message."""
        return "the thread that reads"

    def close(self) -> None:
        """Stop the thread and wait for it, if it does not hang."""
        self._stop.set()
        self._thread.join(timeout=30)


_END = object()


class Workers(Ahead):
    """Processes that keep `prefetch` batches each ready. What may hang with them hangs in the thread that takes the
    batches in, never in the consumer: a worker that stands still does not answer for what it has delivered."""

    def __init__(
        self, batches: Guarded, numbers: Iterable[int], workers: int, prefetch: int, pin: bool
    ) -> None:
        try:
            iterator = _loaded(batches, numbers, workers, prefetch, pin)
        except OSError as error:
            _forget(error)
            raise DataError(f"the data workers could not be started: {error}. {_shared_memory()}") from None
        self._processes = list(iterator._workers)
        super().__init__(_received(iterator), depth=1)

    def describe(self) -> str:
        states = (f"{p.pid} {'runs' if p.is_alive() else 'has ended'}" for p in self._processes)
        return f"data workers: {', '.join(states)}"

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=4 * POLL_S)
        if not self._thread.is_alive():
            self._items = iter(())  # the loader goes: it asks its workers to end, and waits for a while
        for process in self._processes:
            if process.is_alive():
                process.kill()  # they are deaf to SIGTERM, and Python would wait for them at its end
                process.join(timeout=5)
        self._thread.join(timeout=5)


def _received(iterator: Any) -> Iterator[Any]:
    """What the workers deliver; None where there was nothing for a while."""
    while True:
        try:
            yield next(iterator)
        except StopIteration:
            return
        except Exception as error:  # of the loader itself: what goes wrong with a batch is a value
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            if "DataLoader timed out" not in text:
                hint = "A worker that ends without a word was killed, or found no memory."
                yield Failure(DataError(f"the data workers are lost ({text}). {hint} {_shared_memory()}"))
                return
            yield None


def _forget(error: OSError) -> None:
    """Free the half-made loader that an error holds; its complaint that it is half-made helps nobody."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        error.__traceback__ = None
        gc.collect()
    finally:
        sys.unraisablehook = before


def _loaded(batches: Guarded, numbers: Iterable[int], workers: int, prefetch: int, pin: bool) -> Any:
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
