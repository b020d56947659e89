"""Copying a rank's tensors to host memory that is allocated once, beside the training loop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.checkpoint.boxes import Boxes
from pretrain.errors import CheckpointError

ALIGNMENT_ELEMENTS = 16  # 64 bytes: a cache line, so that neighbouring blocks are copied with aligned stores


@dataclass(frozen=True)
class Views:
    """What is to be copied: float32 blocks that still are the engine's memory.

    Attributes:
        leaves: as DCP will save them.
        versions: the autograd version counter of each block when it was collected.
        step_counts: Adam's live step counters, each with its copy of that moment. Fused AdamW moves no
            version counter, but in every form of it a step adds to the counter before it changes a tensor.
        ready: recorded when the views were collected, after all that computes them; None without CUDA.
        device: the CUDA device that some of the blocks lie on; None without.
    """

    leaves: dict[str, Boxes]
    versions: list[int]
    step_counts: list[tuple[Tensor, Tensor]]
    ready: torch.cuda.Event | None
    device: torch.device | None


def collect(leaves: dict[str, Boxes], step_counts: list[tuple[Tensor, Tensor]]) -> Views:
    """Note what is to be copied, and from which moment of the device on it may be. Copies nothing.

    Args:
        leaves: of views of the engine's memory.
        step_counts: as in `Views`.
    """
    devices = {view.device for leaf in leaves.values() for view in leaf.blocks.values() if view.is_cuda}
    assert len(devices) <= 1, f"one rank's tensors lie on {devices}"
    if not devices:
        return Views(leaves, _versions(leaves), step_counts, None, None)
    (device,) = devices
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(device))
    return Views(leaves, _versions(leaves), step_counts, ready, device)


class Stager:
    """Copies views into one reused float32 host buffer, page-locked where they lie on a GPU.

    The buffer is allocated at the first copy and stays: it is all the memory that staging takes, at any time.

    Args:
        copies: False leaves what is in host memory already where it is, for a save that the loop waits for.
    """

    def __init__(self, *, copies: bool) -> None:
        self._copies = copies
        self._buffer = torch.empty(0, dtype=torch.float32)
        self._stream: torch.cuda.Stream | None = None

    @property
    def buffer_bytes(self) -> int:
        """Size of the buffer: that of the largest state staged so far, each block filled up to 64 bytes."""
        return self._buffer.nbytes

    def stage(self, views: Views) -> dict[str, Boxes]:
        """Copy every block; may run in another thread than `collect` did. Valid until the next call.

        Returns:
            The same leaves, their blocks contiguous in host memory.

        Raises:
            CheckpointError: a block was changed between `collect` and the end of the copy.
        """
        if views.ready is None:
            staged = self._copy_all(views.leaves, pinned=False)
            _check_unchanged(views)
            return staged
        return self._copy_on_side_stream(views, views.ready)

    def _copy_on_side_stream(self, views: Views, ready: torch.cuda.Event) -> dict[str, Boxes]:
        if self._stream is None:
            self._stream = torch.cuda.Stream(views.device)
        # The context makes the stream's device this thread's too, which page-locking would else take to be 0
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            staged = self._copy_all(views.leaves, pinned=True)
            self._stream.synchronize()
            # Here too: on the default stream, reading the counters would wait for the loop's queued work
            _check_unchanged(views)
        return staged

    def _copy_all(self, leaves: dict[str, Boxes], *, pinned: bool) -> dict[str, Boxes]:
        room = sum(self._room(view) for leaf in leaves.values() for view in leaf.blocks.values())
        if self._buffer.numel() < room:
            self._buffer = torch.empty(room, dtype=torch.float32, pin_memory=pinned)
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
        return staged

    def _room(self, view: Tensor) -> int:
        """Elements that a block takes in the buffer."""
        if not self._copies and view.is_cpu and view.is_contiguous():
            return 0
        return -(-view.numel() // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS


def _check_unchanged(views: Views) -> None:
    """Called after the copy, so that an update which began during it has counted its step already.

    Raises:
        CheckpointError: an update, or another change in place, came before the end of the copy.
    """
    counted = any(not torch.equal(live, copy) for live, copy in views.step_counts)
    if counted or _versions(views.leaves) != views.versions:
        raise CheckpointError(
            "tensors were changed while they were being copied: "
            "call the store's wait_staged before each update of the optimizer"
        )


def _versions(leaves: dict[str, Boxes]) -> list[int]:
    """Autograd's count of the changes in place of each block, which its views and its base share."""
    return [view._version for leaf in leaves.values() for view in leaf.blocks.values()]


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
