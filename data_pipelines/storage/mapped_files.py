"""Files mapped into memory, and what becomes of a process that has one mapped when it is cut short.

The kernel answers a read behind a mapped file's new end with SIGBUS, of which Python makes nothing: the process dies
without a word. Reading through the system instead (pread) would tell, and takes twice the time of a batch
(`benchmarks/data_reading.py`); so the signal is answered here, with the file's name.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError

EXIT_DATA_ERROR = 2


def map_file(path: Path) -> mmap.mmap:
    """Memory-map a file for reading.

    Raises:
        DataError: the file is missing or empty.
    """
    try:
        with path.open("rb") as file:
            found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Copy it from the dataset's origin or build again.") from None
    except ValueError:
        raise DataError(f"{path}: the file is empty. Copy it again or build the dataset again.") from None
    _bus_errors.watch(path, len(found))
    return found


class _BusErrors:
    """The process's answer to SIGBUS. There is one such signal, so there is one of these."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._pid = 0
        self._previous: Any = None
        # Kept: the C library holds no reference to it.
        self._answer: Any = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._on_signal)

    def watch(self, path: Path, size: int) -> None:
        """Name this file if it is the cause."""
        self._sizes[str(path)] = size
        if self._pid != os.getpid():  # a worker's own libraries have put theirs in place since it began
            self._pid = os.getpid()
            before = _set_handler(self._answer)
            if before != ctypes.cast(self._answer, ctypes.c_void_p).value:  # which a fork has from its parent
                self._previous = before

    def _on_signal(self, _number: int) -> None:
        # On the thread that read, inside the copy. Nothing is done here but to look, to say it and to leave.
        for path, size in list(self._sizes.items()):
            try:
                now = os.stat(path).st_size  # noqa: PTH116
            except OSError:
                continue
            if now < size:
                text = f"error: {path}: truncated while it was read: {now} bytes of {size}. "
                text += "Copy it again from its origin, then the same command goes on\n"
                os.write(2, text.encode(errors="replace"))
                os._exit(EXIT_DATA_ERROR)
        _set_handler(self._previous)  # of another cause: what was to happen without us


def _set_handler(handler: Any) -> Any:
    """The C library's `signal`: Python's own handlers run between two instructions of Python, and here none comes.
    Returns the handler before."""
    function = ctypes.CDLL(None).signal
    function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    return function(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p) if handler is not None else None)


_bus_errors = _BusErrors()
