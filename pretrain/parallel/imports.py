"""Importing Megatron-core and DeepSpeed: quiet and, on a machine without CUDA, quick."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def quick_and_quiet() -> Iterator[None]:
    """Import megatron.core's modules inside of this.

    The package wraps functions in torch.compile as it is imported, and the first such call imports the whole of
    Inductor: two of a CPU's seconds in every rank of every start, for functions that CPUs never run compiled.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Megatron warns once per optional library that is not installed; none of them is used here.
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            stack.callback(setattr, torch, "compile", torch.compile)
            torch.compile = lambda function=None, **_: function or (lambda inner: inner)  # type: ignore[assignment]
        yield


def quiet_renamed_collectives() -> None:
    """DeepSpeed 0.19.8 and megatron-core 0.16.1 call collectives that torch 2.13 has renamed."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
