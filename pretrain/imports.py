"""Importing what is slow to import."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Import without Python's garbage collector, for processes that import a lot once.

    It would look over all modules again and again, a sixth of the time of importing torch and the engines, and find
    nothing, for modules stay. Nor does it look at them later (`gc.freeze`), in the middle of training.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def without_compiling() -> Iterator[None]:
    """Import packages that wrap functions in torch.compile as they are imported, on a machine without CUDA.

    The first such call imports the whole of Inductor: two of a CPU's seconds in every rank of every start, for
    functions that CPUs never run compiled.
    """
    import torch

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


@contextlib.contextmanager
def quick_and_quiet() -> Iterator[None]:
    """Import Megatron-core `without_compiling`, and without its warnings, one per optional library that is not
    installed: none of them is used here."""
    with warnings.catch_warnings(), without_compiling():
        warnings.simplefilter("ignore")
        yield


def quiet_renamed_collectives() -> None:
    """DeepSpeed 0.19.8 and megatron-core 0.16.1 call collectives that torch 2.13 has renamed."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
