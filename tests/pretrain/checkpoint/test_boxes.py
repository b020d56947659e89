"""Flat ranges become rectangles that lie where the elements lie in the plain tensor."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.checkpoint.boxes import boxes_of_fragment, rectangles_of_range
from pretrain.checkpoint.fragments import Fragment, Placement, Segment

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@given(SHAPES, st.data())
@settings(max_examples=300, deadline=None)
def test_rectangles_cover_the_range_once_and_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    elements = math.prod(shape)
    start = data.draw(st.integers(0, elements))
    stop = data.draw(st.integers(start, elements))
    rectangles = rectangles_of_range(shape, start, stop)
    assert len(rectangles) <= max(1, 2 * len(shape) - 1)
    numbered = torch.arange(elements).view(shape)
    covered = [
        numbered[tuple(slice(o, o + s) for o, s in zip(*rectangle, strict=True))].flatten()
        for rectangle in rectangles
    ]
    assert torch.cat([torch.empty(0, dtype=torch.long), *covered]).tolist() == list(range(start, stop))


@st.composite
def split_tensors(draw: st.DrawFn) -> tuple[Tensor, int, int, list[tuple[Segment, ...]]]:
    """A tensor of several fused parts along a dim, each split evenly over the ranks: as a fused [q; k; v]."""
    ranks = draw(st.integers(1, 3))
    dim = draw(st.integers(0, 1))
    parts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    other = draw(st.integers(1, 4))
    placements: list[tuple[Segment, ...]] = []
    for rank in range(ranks):
        segments, local_start, global_start = [], 0, 0
        for part in parts:
            segments.append(Segment(local_start, global_start + rank * part, part))
            local_start += part
            global_start += part * ranks
        placements.append(tuple(segments))
    split = ranks * sum(parts)
    shape = (split, other) if dim == 0 else (other, split)
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape), dim, ranks, placements


@given(split_tensors(), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_fragments_of_all_ranks_fill_the_plain_tensor(
    split: tuple[Tensor, int, int, list[tuple[Segment, ...]]], data_ranks: int, padding: int
) -> None:
    plain, dim, ranks, placements = split
    rebuilt = torch.full_like(plain, -1)
    for rank in range(ranks):
        pieces = [plain.narrow(dim, s.global_start, s.length) for s in placements[rank]]
        local = torch.cat(pieces, dim)
        flat = torch.cat([local.flatten(), torch.full((padding * data_ranks,), -2.0)])
        length = -(-flat.numel() // data_ranks)
        for data_rank in range(data_ranks):
            start = data_rank * length
            owned = {"master": flat[start : start + length]}
            placement = Placement(tuple(plain.shape), dim, placements[rank])
            fragment = Fragment("w", tuple(local.shape), start, owned, torch.zeros(()), placement)
            for offsets, view in boxes_of_fragment(fragment, owned["master"]).blocks.items():
                target = rebuilt[tuple(slice(o, o + n) for o, n in zip(offsets, view.shape, strict=True))]
                assert (target == -1).all(), "two fragments overlap"
                target.copy_(view)
    assert torch.equal(rebuilt, plain)


def test_a_padded_vocabulary_is_clipped_and_a_rank_of_padding_holds_nothing() -> None:
    for rank, rows in enumerate((4, 1, 0)):
        placement = Placement((5, 2), 0, (Segment(0, rank * 4, rows),) if rows else ())
        flat = torch.arange(8.0)
        fragment = Fragment("embedding", (4, 2), 0, {"master": flat}, torch.zeros(()), placement)
        sizes = [tuple(view.shape) for view in boxes_of_fragment(fragment, flat).blocks.values()]
        assert sizes == ([(rows, 2)] if rows else [])
