"""Copying a rank's tensors out of the training loop's way, into host memory that is allocated once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pretrain.checkpoint.boxes import Boxes

ALIGNMENT_ELEMENTS = 16  # 64 bytes: a cache line, so that neighbouring blocks are copied with aligned stores


class Stager:
    """Copies leaves into one reused float32 host buffer, page-locked where there is CUDA.

    The copy is the only part of an asynchronous save that the training loop waits for.

    Args:
        copies: False leaves what is in host memory already where it is, for a save that the loop waits for.
    """

    def __init__(self, *, copies: bool) -> None:
        self._copies = copies
        self._pinned = torch.cuda.is_available()
        self._buffer = torch.empty(0, dtype=torch.float32)

    def stage(self, leaves: dict[str, Boxes]) -> dict[str, Boxes]:
        """Copy every block. The result is valid until the next call.

        Args:
            leaves: float32 blocks on any device.

        Returns:
            The same leaves, their blocks contiguous in host memory.
        """
        self._reserve(sum(self._room(view) for leaf in leaves.values() for view in leaf.blocks.values()))
        memory = self._buffer.numpy()
        staged: dict[str, Boxes] = {}
        position = 0
        for name, leaf in leaves.items():
            blocks: dict[tuple[int, ...], Tensor] = {}
            for offsets, view in leaf.blocks.items():
                assert view.dtype == torch.float32, f"{name} is {view.dtype}, not float32"
                room = self._room(view)
                blocks[tuple(offsets)] = _copy(_slice(memory, position, view), view) if room else _alias(view)
                position += room
            staged[name] = Boxes(tuple(leaf.global_shape), leaf.dtype, blocks)
        if self._pinned:
            torch.cuda.current_stream().synchronize()
        return staged

    def _room(self, view: Tensor) -> int:
        """Elements that a block takes in the buffer."""
        if not self._copies and view.is_cpu and view.is_contiguous():
            return 0
        return -(-view.numel() // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS

    def _reserve(self, elements: int) -> None:
        if self._buffer.numel() < elements:
            self._buffer = torch.empty(elements, dtype=torch.float32, pin_memory=self._pinned)


def _slice(memory: np.ndarray, position: int, like: Tensor) -> Tensor:
    """A tensor over part of `memory` whose storage ends where the tensor does.

    DCP's writer clones any tensor whose storage is larger than itself, and a torch view of the buffer would
    be one.
    """
    return torch.from_numpy(memory[position : position + like.numel()]).view(like.shape)


def _alias(view: Tensor) -> Tensor:
    """The same memory, under a storage that ends where the view does."""
    return torch.from_numpy(view.detach().numpy())


def _copy(target: Tensor, view: Tensor) -> Tensor:
    if view.is_cpu and view.is_contiguous():
        # numpy copies by memcpy, which bypasses the cache for large blocks; torch's kernel does not
        np.copyto(target.numpy(), view.detach().numpy())
    else:
        target.copy_(view.detach(), non_blocking=True)
    return target
