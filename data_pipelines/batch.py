"""What the pipelines hand to training. B rows, T time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
class Batch:
    """Packed rows. Documents follow each other without a gap; a row may begin and end inside one.

    Kept small, 13 bytes per token: all of it is written by one core and copied to a GPU. Places in a row are
    int16, and int32 only where T is above 32,768.
    """

    sequences: Tensor  # (B, T + 1) int64: the tokens and the one that follows the row
    weights: Tensor  # (B, T) bool: False where the target belongs to another document or is padding
    segment_ids: Tensor  # (B, T) int16: 0, 1, 2 ... within the row; a new number for each document
    positions: Tensor  # (B, T) int16: tokens since the segment began in this row
    rows: Tensor  # (B,) int64: numbers of the rows in the run
    cursor: Cursor  # the state of the stream after the optimizer step that this batch belongs to
    answers: Tensor | None = None  # (B, T) int64: what to say at each place, where that is not the next token

    @property
    def tokens(self) -> Tensor:
        """(B, T) int64, a view."""
        return self.sequences[:, :-1]

    @property
    def targets(self) -> Tensor:
        """(B, T) int64: the token that follows, as a view, or the answer of a synthetic task."""
        return self.sequences[:, 1:] if self.answers is None else self.answers

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            change(self.sequences),
            change(self.weights),
            change(self.segment_ids),
            change(self.positions),
            change(self.rows),
            self.cursor,
            None if self.answers is None else change(self.answers),
        )

    def split(self, rows: int) -> list[Batch]:
        """Micro-batches of `rows` rows (the last may be smaller), as views."""
        if rows < 1:
            raise DataError(f"a micro-batch of {rows} rows: it must have at least one.")
        if rows >= len(self.rows):
            return [self]
        slices = [slice(start, start + rows) for start in range(0, len(self.rows), rows)]
        return [self._map(lambda tensor, part=part: tensor[part]) for part in slices]  # type: ignore[misc]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """On another device, or this batch itself if it is there; with pinned memory and `non_blocking` the
        copy does not wait."""
        if self.sequences.device == torch.device(device):
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """In page-locked memory, for copies to a GPU that do not wait."""
        return self._map(lambda tensor: tensor.pin_memory())
