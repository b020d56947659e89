"""What the pipelines hand to training. B rows, T time, N masked tokens to predict, P parts of a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from data_pipelines.errors import DataError


@dataclass(frozen=True)
class Cursor:
    """The whole state of the stream after a batch."""

    row: int  # rows consumed since the run began
    fingerprint: str  # of the datasets, mixture, sequence length and seed

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"row": self.row, "fingerprint": self.fingerprint}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Cursor:
        """From a checkpoint.

        Raises:
            DataError: the state is not that of a cursor.
        """
        row, fingerprint = state.get("row"), state.get("fingerprint")
        if not isinstance(row, int) or row < 0 or not isinstance(fingerprint, str):
            raise DataError(
                f"the checkpoint's data cursor {state!r} is not one (row and fingerprint wanted)."
            )
        return cls(row, fingerprint)


@dataclass(frozen=True)
class Corruption:
    """Rows as a denoising model sees them, drawn on the host: how many tokens are to be predicted, and where, is
    known without asking a device."""

    inputs: Tensor  # (B, T) int64: the tokens, some of them [MASK]
    places: Tensor  # (N,) int64: of the tokens to predict in the flat (B T), ascending
    weights: Tensor  # (N,) float32: in the training loss
    elbo_weights: Tensor  # (N,) float32: in the likelihood bound; 0 where it does not count
    loss_parts: Tensor  # (N, 3) uint8: which parts of the loss the token belongs to
    targets: Tensor  # (B,) int32: tokens that the training loss is divided by
    loss_part_targets: Tensor  # (B, P) int32: tokens that each part is divided by
    row_places: tuple[int, ...]  # places of each row; they add up to N

    def to_each(self, change: Callable[[Tensor], Tensor]) -> Corruption:
        """The same with every tensor changed."""
        return Corruption(
            inputs=change(self.inputs),
            places=change(self.places),
            weights=change(self.weights),
            elbo_weights=change(self.elbo_weights),
            loss_parts=change(self.loss_parts),
            targets=change(self.targets),
            loss_part_targets=change(self.loss_part_targets),
            row_places=self.row_places,
        )

    def rows(self, first: int, end: int) -> Corruption:
        """Those of rows [first, end), as views but for the places, which count from the first of them."""
        ends = [0, *accumulate(self.row_places)]
        rows, tokens = slice(first, end), slice(ends[first], ends[end])
        return Corruption(
            inputs=self.inputs[rows],
            places=self.places[tokens] - first * self.inputs.shape[1],
            weights=self.weights[tokens],
            elbo_weights=self.elbo_weights[tokens],
            loss_parts=self.loss_parts[tokens],
            targets=self.targets[rows],
            loss_part_targets=self.loss_part_targets[rows],
            row_places=self.row_places[rows],
        )


@dataclass(frozen=True)
class Batch:
    """Packed rows. Documents follow each other without a gap; a row may begin and end inside one. In rows of text each
    document begins with an end-of-text token, from which its first token is predicted, and a row that begins inside
    a document begins with the token before.

    Kept small, 13 bytes per token: all of it is written by one core and copied to a GPU. Places in a row are
    int16, and int32 only where T is above 32,768.
    """

    sequences: Tensor  # (B, T + 1) int64: the tokens and the last one's target
    weights: Tensor  # (B, T) bool: False where the target is padding
    segment_ids: Tensor  # (B, T) int16: 0, 1, 2 ... within the row; a new number for each document
    positions: Tensor  # (B, T) int16: tokens since the segment began in this row; or (B, T, 2), on two axes
    rows: Tensor  # (B,) int64: numbers of the rows in the run
    cursor: Cursor  # the state of the stream after the optimizer step that this batch belongs to
    answers: Tensor | None = None  # (B, T) int64: what to say at each place, where that is not the next token
    corruption: Corruption | None = None  # what a denoising objective is to see and to predict

    @property
    def tokens(self) -> Tensor:
        """(B, T) int64, a view."""
        return self.sequences[:, :-1]

    @property
    def targets(self) -> Tensor:
        """(B, T) int64: the token that follows, as a view, or the answer of a synthetic task."""
        return self.sequences[:, 1:] if self.answers is None else self.answers

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """With every tensor changed but those of the corruption, which is dropped."""
        return Batch(
            change(self.sequences),
            change(self.weights),
            change(self.segment_ids),
            change(self.positions),
            change(self.rows),
            self.cursor,
            None if self.answers is None else change(self.answers),
        )

    def _map_all(self, change: Callable[[Tensor], Tensor]) -> Batch:
        corruption = None if self.corruption is None else self.corruption.to_each(change)
        return replace(self._map(change), corruption=corruption)

    def _rows(self, first: int, end: int) -> Batch:
        corruption = None if self.corruption is None else self.corruption.rows(first, end)
        return replace(self._map(lambda tensor: tensor[first:end]), corruption=corruption)

    def take(self, places: Tensor) -> Batch:
        """The rows at these places of the batch, which must not be corrupted yet."""
        assert self.corruption is None, "rows are chosen before they are corrupted"
        return self._map(lambda tensor: tensor[places])

    def split(self, rows: int) -> list[Batch]:
        """Micro-batches of `rows` rows (the last may be smaller), as views."""
        if rows < 1:
            raise DataError(f"a micro-batch of {rows} rows: it must have at least one.")
        if rows >= len(self.rows):
            return [self]
        count = len(self.rows)
        return [self._rows(start, min(start + rows, count)) for start in range(0, count, rows)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """On another device, or this batch itself if it is there; with pinned memory and `non_blocking` the
        copy does not wait."""
        if self.sequences.device == torch.device(device):
            return self
        return self._map_all(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """In page-locked memory, for copies to a GPU that do not wait."""
        return self._map_all(lambda tensor: tensor.pin_memory())
