"""The goldfish loss, an objective of one's own: next-token prediction that leaves one token in k out of the training
loss, chosen by the tokens before it, so that no passage is ever learned word for word.

Source: Hans et al., "Be like a Goldfish, Don't Memorize!", arXiv:2406.10209.
Shape suffixes: B rows, T time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from pydantic import Field

from data_pipelines.stream.batch import Batch, Cursor
from pretrain.config.objective import ObjectiveSection
from pretrain.objectives.counters import hashed, key
from pretrain.objectives.next_token import NextToken

if TYPE_CHECKING:
    from data_pipelines.stream.stream import Rows
    from data_pipelines.tokens.vocabulary import Vocabulary
    from pretrain.config import Config


class Goldfish(ObjectiveSection):
    """What `objective` may say in a config. The same passage loses the same tokens wherever it stands."""

    objective: ClassVar[str] = "goldfish:GoldfishLoss"
    scores_text: ClassVar[bool] = True  # evaluations leave nothing out

    every: int = Field(default=4, ge=2, le=1_000_000)
    """One token in so many is left out."""
    context: int = Field(default=13, ge=1, le=1024)
    """The tokens before it that decide. A document's first tokens, which have fewer, are all learned."""


@dataclass(frozen=True)
class GoldfishLoss(NextToken):
    every: int = 4
    context: int = 13

    @classmethod
    def build(cls, config: Config, vocabulary: Vocabulary | None) -> Self:
        assert isinstance(config.objective, Goldfish)
        return cls(every=config.objective.every, context=config.objective.context)

    def rows(self, rows: Any) -> GoldfishRows:
        """The rows, some of whose tokens have no weight. Whole rows are seen here, also where ranks share them."""
        return GoldfishRows(rows, self)

    def left_out(self, batch: Batch) -> torch.Tensor:
        """(B, T) bool: the targets that are not learned."""
        tokens_BT = batch.tokens.numpy()
        behind = [np.roll(tokens_BT, shift, axis=1) for shift in range(self.context)]
        chosen_BT = hashed(key("goldfish", self.every, self.context), *behind) % np.uint64(self.every) == 0
        is_whole_BT = batch.positions.numpy() >= self.context - 1  # all of them are of this document and row
        return torch.from_numpy(chosen_BT & is_whole_BT)


class GoldfishRows:
    """Rows by number, as training reads them. The order of the data is as it was, and so is its fingerprint."""

    def __init__(self, rows: Rows, loss: GoldfishLoss) -> None:
        self._rows, self._loss = rows, loss
        self.fingerprint, self.refused = rows.fingerprint, rows.refused

    def batch(self, rows: Sequence[int], cursor: Cursor | None = None) -> Batch:
        batch = self._rows.batch(rows, cursor)
        return dataclasses.replace(batch, weights=batch.weights & ~self._loss.left_out(batch))
