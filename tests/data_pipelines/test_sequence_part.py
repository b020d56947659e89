"""Parts of a batch's positions: together they are the batch."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.errors import DataError
from data_pipelines.stream.batch import Batch, Corruption, Cursor
from data_pipelines.stream.sequence_part import SequencePart, part_of_batch

orders = st.sampled_from(["contiguous", "balanced"])


def batch(rows: int, time: int, seed: int) -> Batch:
    """Random rows, some of whose tokens are to be predicted."""
    generator = torch.Generator().manual_seed(seed)
    sequences = torch.randint(50, (rows, time + 1), generator=generator)
    masked_BT = torch.rand(rows, time, generator=generator) < 0.3
    places = masked_BT.flatten().nonzero()[:, 0]
    corruption = Corruption(
        inputs=sequences[:, :-1].masked_fill(masked_BT, 99),
        places=places,
        weights=torch.rand(len(places), generator=generator),
        elbo_weights=torch.rand(len(places), generator=generator),
        loss_parts=torch.randint(9, (len(places), 3), generator=generator).to(torch.uint8),
        targets=torch.randint(1, time, (rows,), generator=generator, dtype=torch.int32),
        loss_part_targets=torch.randint(time, (rows, 4), generator=generator, dtype=torch.int32),
        row_places=tuple(masked_BT.sum(1).tolist()),
    )
    return Batch(
        sequences=sequences,
        weights=torch.rand(rows, time, generator=generator) < 0.8,
        segment_ids=(torch.rand(rows, time, generator=generator) < 0.2).cumsum(1).to(torch.int16),
        positions=torch.randint(time, (rows, time, 2), generator=generator).to(torch.int16),
        rows=torch.arange(rows),
        cursor=Cursor(rows, "f"),
        corruption=corruption,
    )


@settings(deadline=None)  # of a busy machine
@given(orders, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9))
def test_every_position_is_in_one_part(
    order: Literal["contiguous", "balanced"], count: int, length: int, rows: int, seed: int
) -> None:
    time = length * 2 * count
    whole = batch(rows, time, seed)
    numbered = torch.arange(time).expand(rows, -1)
    seen = []
    for number in range(count):
        part = SequencePart(number, count, order)
        made, place_BS = part_of_batch(whole, part), part.take(numbered)
        seen += place_BS[0].tolist()
        for name in ("tokens", "targets", "weights", "positions"):
            mine, all_ = getattr(made, name), getattr(whole, name)
            assert all(torch.equal(mine[row], all_[row, place_BS[row]]) for row in range(rows)), name
        assert torch.equal(made.segment_ids, whole.segment_ids)
    assert sorted(seen) == list(range(time))


@settings(deadline=None)  # of a busy machine
@given(orders, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9))
def test_every_masked_token_is_in_one_part(
    order: Literal["contiguous", "balanced"], count: int, length: int, rows: int, seed: int
) -> None:
    time = length * 2 * count
    whole = batch(rows, time, seed)
    assert whole.corruption is not None
    drawn = whole.corruption
    numbered = torch.arange(rows * time).view(rows, time)
    found: list[tuple[float, ...]] = []
    targets, part_targets = torch.zeros_like(drawn.targets), torch.zeros_like(drawn.loss_part_targets)
    for number in range(count):
        part = SequencePart(number, count, order)
        # As training does: its rows' part, then micro-batches of them.
        for row, micro in enumerate(part_of_batch(whole, part).split(1)):
            mine = micro.corruption
            assert mine is not None
            place_N = part.take(numbered[row : row + 1]).flatten()[mine.places]
            assert torch.equal(mine.inputs, part.take(drawn.inputs[row : row + 1]))
            assert mine.places.tolist() == sorted(mine.places.tolist())
            found += zip(
                place_N.tolist(),
                mine.weights.tolist(),
                mine.elbo_weights.tolist(),
                mine.loss_parts.tolist(),
                strict=True,
            )
            targets[row] += mine.targets[0]
            part_targets[row] += mine.loss_part_targets[0]
    expected = zip(
        drawn.places.tolist(),
        drawn.weights.tolist(),
        drawn.elbo_weights.tolist(),
        drawn.loss_parts.tolist(),
        strict=True,
    )
    assert sorted(found) == sorted(expected)
    assert torch.equal(targets, drawn.targets)
    assert torch.equal(part_targets, drawn.loss_part_targets)


def test_balanced_parts_see_equally_much() -> None:
    """A causal query at position t has t + 1 keys."""
    work = [
        sum(end * (end + 1) - first * (first + 1) for first, end in SequencePart(p, 4, "balanced").ranges(64))
        for p in range(4)
    ]
    assert len(set(work)) == 1


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(DataError, match="12 positions does not divide into 8"):
        SequencePart(0, 4, "balanced").ranges(12)
