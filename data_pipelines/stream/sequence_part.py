"""One part of a batch's positions, for ranks that share rows. B rows, T time, N masked tokens to predict."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from data_pipelines.errors import DataError
from data_pipelines.stream.batch import Batch, Corruption

Order = Literal["contiguous", "balanced"]


@dataclass(frozen=True)
class SequencePart:
    """Which positions of every row: part `number` of `count`.

    order: "contiguous" cuts a row into `count` pieces, part p being piece p. "balanced" cuts it into 2 count, part p
        being pieces p and 2 count - 1 - p: with causal attention a late position has more to see than an early one,
        and so every part has the same work.
    """

    number: int
    count: int
    order: Order

    @property
    def pieces(self) -> tuple[int, ...]:
        """The numbers of its pieces, ascending."""
        if self.order == "contiguous":
            return (self.number,)
        return (self.number, 2 * self.count - 1 - self.number)

    @property
    def all_pieces(self) -> int:
        return self.count * len(self.pieces)

    def ranges(self, time: int) -> tuple[tuple[int, int], ...]:
        """First and one past the last position of each piece of a row of `time` positions.

        Raises:
            DataError: the row does not divide.
        """
        length, rest = divmod(time, self.all_pieces)
        if rest:
            raise DataError(f"a row of {time} positions does not divide into {self.all_pieces} pieces.")
        return tuple((piece * length, (piece + 1) * length) for piece in self.pieces)

    def take(self, x: Tensor) -> Tensor:
        """x (B, T, ...) at its positions, (B, T / count, ...)."""
        return torch.cat([x[:, first:end] for first, end in self.ranges(x.shape[1])], dim=1)


def part_of_batch(batch: Batch, part: SequencePart) -> Batch:
    """The batch as seen by one of the ranks that share its rows.

    Tokens, targets, weights and positions are the part's; segment ids stay those of the whole rows, for what a
    position sees lies in other parts too. What a corruption counts per row, and not per token, stands in part 0 alone
    and is 0 in the others, so that losses and weights of all parts add up to the batch's.
    """
    tokens_BT = part.take(batch.tokens)
    corruption = batch.corruption
    return replace(
        batch,
        # The last column, which targets are usually read from, follows nothing here: the targets are `answers`.
        sequences=torch.cat((tokens_BT, tokens_BT[:, -1:]), dim=1),
        weights=part.take(batch.weights),
        positions=part.take(batch.positions),
        answers=part.take(batch.targets),
        corruption=None if corruption is None else _part_of_corruption(corruption, part),
    )


def _part_of_corruption(corruption: Corruption, part: SequencePart) -> Corruption:
    rows, time = corruption.inputs.shape
    ranges = part.ranges(time)
    local_T = torch.full((time,), -1)
    local = 0
    for first, end in ranges:
        local_T[first:end] = torch.arange(local, local + end - first)
        local += end - first
    row_N, place_N = corruption.places // time, local_T[corruption.places % time]
    here = place_N >= 0
    places_N = row_N[here] * local + place_N[here]
    ends = torch.searchsorted(places_N, torch.arange(rows + 1) * local).tolist()
    counted = 1 if part.number == 0 else 0
    return Corruption(
        inputs=part.take(corruption.inputs),
        places=places_N,
        weights=corruption.weights[here],
        elbo_weights=corruption.elbo_weights[here],
        loss_parts=corruption.loss_parts[here],
        targets=corruption.targets * counted,
        loss_part_targets=corruption.loss_part_targets * counted,
        row_places=tuple(end - start for start, end in pairwise(ends)),
    )
