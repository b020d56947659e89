"""Flat ranges of local tensors as rectangles of the plain model's tensors, as DCP reads and writes them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pretrain.checkpoint.fragments import Fragment, Placement

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem


class Rectangle(NamedTuple):
    """An axis-aligned block of a tensor: first index and extent along every dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def rectangles_of_range(shape: tuple[int, ...], start: int, stop: int) -> list[Rectangle]:
    """Cut the row-major flat range [start, stop) of a tensor of this shape into rectangles.

    Args:
        shape: the tensor's shape; () is a scalar.
        start: first flat element.
        stop: one past the last, at most the tensor's number of elements.

    Returns:
        At most 2 * len(shape) - 1 disjoint rectangles in row-major order whose union is the range.
    """
    if start >= stop:
        return []
    if not shape:
        return [Rectangle((), ())]
    if len(shape) == 1:
        return [Rectangle((start,), (stop - start,))]
    inner_shape = shape[1:]
    inner = math.prod(inner_shape)
    first_row, first_column = divmod(start, inner)
    last_row, last_column = divmod(stop, inner)
    if first_row == last_row:
        return _in_row(first_row, rectangles_of_range(inner_shape, first_column, last_column))
    rectangles: list[Rectangle] = []
    if first_column:
        rectangles += _in_row(first_row, rectangles_of_range(inner_shape, first_column, inner))
        first_row += 1
    if first_row < last_row:
        offsets = (first_row, *(0 for _ in inner_shape))
        rectangles.append(Rectangle(offsets, (last_row - first_row, *inner_shape)))
    if last_column:
        rectangles += _in_row(last_row, rectangles_of_range(inner_shape, 0, last_column))
    return rectangles


def _in_row(row: int, rectangles: list[Rectangle]) -> list[Rectangle]:
    return [Rectangle((row, *r.offsets), (1, *r.sizes)) for r in rectangles]


class Boxes:
    """A leaf of a DCP state dict: the blocks of one global tensor that this rank holds, as views.

    DCP recognises it by `__create_write_items__` and `__create_chunk_list__`; the planners of this package
    resolve its blocks. Ranks may hold equal blocks (replicas); DCP then writes one of them.

    Args:
        global_shape: the plain model's tensor.
        dtype: of the stored tensor.
        blocks: global offsets -> view of that block, shaped as the block is.
    """

    def __init__(
        self, global_shape: tuple[int, ...], dtype: torch.dtype, blocks: dict[tuple[int, ...], Tensor]
    ) -> None:
        self.global_shape = torch.Size(global_shape)
        self.dtype = dtype
        self.blocks = {torch.Size(offsets): view for offsets, view in blocks.items()}

    def size(self) -> torch.Size:
        """The global shape: DCP compares it with the stored one."""
        return self.global_shape

    def block(self, index: MetadataIndex) -> Tensor:
        """The view that DCP's index means."""
        assert index.offset is not None, "a block is addressed by its offsets"
        return self.blocks[index.offset]

    def __create_write_items__(self, name: str, _leaf: object) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            MetadataIndex,
            TensorProperties,
        )
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        return [
            WriteItem(
                MetadataIndex(name, offsets),
                # SHARD, also for a whole tensor: DCP drops replicated shards, but refuses replicated TENSOR
                # items
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets, view.size()),
                    properties=TensorProperties(dtype=self.dtype),
                    size=self.global_shape,
                ),
            )
            for offsets, view in self.blocks.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(offsets, view.size()) for offsets, view in self.blocks.items()]


def boxes_of_fragment(fragment: Fragment, flat: Tensor) -> Boxes:
    """Lay one flat tensor of a fragment out as blocks of the plain model's tensor, without a copy.

    Args:
        fragment: says which range of the parameter `flat` holds and where the parameter lies.
        flat: 1-D, at least `fragment.length` elements.

    Returns:
        Boxes of views of `flat`; without blocks when the range holds only padding.
    """
    blocks: dict[tuple[int, ...], Tensor] = {}
    position = 0
    for rectangle in rectangles_of_range(
        fragment.local_shape, fragment.start, fragment.start + fragment.length
    ):
        elements = math.prod(rectangle.sizes)
        view = flat[position : position + elements].view(rectangle.sizes)
        position += elements
        blocks.update(_place(fragment.placement, rectangle, view))
    return Boxes(fragment.placement.shape, flat.dtype, blocks)


def _place(placement: Placement, rectangle: Rectangle, view: Tensor) -> dict[tuple[int, ...], Tensor]:
    """Move a rectangle of the local tensor to where it lies in the plain one, cut at segment boundaries."""
    dim = placement.dim
    if dim is None:
        return {rectangle.offsets: view}
    low, high = rectangle.offsets[dim], rectangle.offsets[dim] + rectangle.sizes[dim]
    placed: dict[tuple[int, ...], Tensor] = {}
    for segment in placement.segments:
        first = max(low, segment.local_start)
        last = min(high, segment.local_start + segment.length)
        if first < last:
            offset = segment.global_start + first - segment.local_start
            offsets = (*rectangle.offsets[:dim], offset, *rectangle.offsets[dim + 1 :])
            placed[offsets] = view.narrow(dim, first - low, last - first)
    return placed


def boxes_of_fragments(fragments: list[Fragment]) -> dict[str, Boxes]:
    """The tensors of all fragments, under `<kind>.<name>`, and their step counts, under `step.<name>`."""
    leaves: dict[str, Boxes] = {}
    for fragment in fragments:
        if fragment.length == 0:
            continue
        assert f"step.{fragment.name}" not in leaves, f"two fragments of {fragment.name} on one rank"
        for kind, flat in fragment.tensors.items():
            leaves[f"{kind}.{fragment.name}"] = boxes_of_fragment(fragment, flat)
        leaves[f"step.{fragment.name}"] = step_leaf(fragment.step)
    return leaves


def step_leaf(step: Tensor) -> Boxes:
    """A step count as a leaf: one element, the same on every rank that has a part of the parameter."""
    return Boxes((1,), torch.float32, {(0,): step.detach().view(1)})
