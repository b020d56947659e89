"""Importing what is slow to import."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def without_compiling() -> Iterator[None]:
    """Import packages that wrap functions in torch.compile as they are imported, on a machine without CUDA.

    The first such call imports the whole of Inductor: two of a CPU's seconds in every rank of every start, for
    functions that CPUs never run compiled.
    """
    if torch.cuda.is_available():
        yield
        return
    compile_ = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_


def _as_it_is(function: Callable[..., Any] | None = None, **_options: Any) -> Callable[..., Any]:
    return _as_it_is if function is None else function
