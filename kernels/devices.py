"""Where a kernel can run."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from torch import Tensor


def runs_triton(tensor: Tensor) -> bool:
    """Whether an op on this tensor launches its Triton kernels.

    True for a CUDA tensor where Triton is installed, and for any tensor in Triton's interpreter
    (TRITON_INTERPRET=1), so that an op's gradients and its registration are tested through the kernels on a
    machine without a GPU.
    """
    return has_triton() and (tensor.device.type == "cuda" or interpreting())


@cache
def has_triton() -> bool:
    """Whether Triton is installed: the CPU builds of torch come without it."""
    return find_spec("triton") is not None


@cache
def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter. Decided where a kernel is decorated: once per process."""
    if not has_triton():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)
