"""Standard output and error that a run outlives: `| head` may end, a terminal may be closed."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import Any, TextIO, cast


class Outlet:
    """A stream that, once it cannot be written to, leads nowhere.

    outlives: whether the program goes on then. Else the error is raised, once: what comes after it, the
        interpreter's own way down included, finds the stream writable.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name
        self._lock = threading.RLock()
        self.outlives = False
        self.gone: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return self.gone is None and self._stream.isatty()

    def write(self, text: str) -> int:
        if self.gone is None:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._leave(error)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.gone is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._leave(error)

    def _leave(self, error: OSError) -> None:
        with self._lock:
            if self.gone is not None:
                return
            self.gone = error
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())  # what the stream still holds goes there too
                os.close(nowhere)
        if not self.outlives:
            raise error
        if self._name == "stdout":
            print(f"warning: standard output is gone ({error.strerror}); the run goes on", file=sys.stderr)


def guard_output() -> tuple[Outlet, Outlet]:
    """Put outlets in place of this process's standard output and error, if they are not there; returns them."""
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), Outlet):
            setattr(sys, name, Outlet(getattr(sys, name) or open(os.devnull, "w"), name))  # noqa: PTH123, SIM115
    return cast(Outlet, sys.stdout), cast(Outlet, sys.stderr)


def outlive_terminal() -> None:
    """From here on nothing that becomes of standard output and error ends the process."""
    for outlet in guard_output():
        outlet.outlives = True
