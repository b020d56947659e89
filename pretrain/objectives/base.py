"""What an objective is: a loss as a sum, and the weight to divide it by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from data_pipelines.stream.batch import Batch
    from data_pipelines.stream.stream import Rows
    from data_pipelines.tokens.vocabulary import Vocabulary
    from pretrain.config import Config


@dataclass(frozen=True)
class LossSum:
    """Summed, not averaged, over a micro-batch, so that splitting a batch never changes a loss.

    total: () what the backward pass starts from, regularisers included.
    loss: () the loss to report, in nats, without gradient.
    parts: (P, 2) float64 sums and weights of the objective's `parts`, without gradient.
    """

    total: Tensor
    loss: Tensor
    parts: Tensor


class Objective(ABC):
    """What a run learns. Whatever is not said otherwise is as in next-token prediction.

    It is called with micro-batches, and where ranks share rows, with a stretch of each: what depends on more of a row
    than that is drawn by `rows`, which sees whole rows.

    scalars: what is logged beside the loss, each a sum over a weight of its own, with its help text. An evaluation logs
        the same under `validation_...`.
    """

    scalars: ClassVar[Mapping[str, str]] = {}

    @classmethod
    @abstractmethod
    def build(cls, config: Config, vocabulary: Vocabulary | None) -> Self:
        """The config's. vocabulary: of data with several modalities, else None."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of `scalars`, in the order of `LossSum.parts`."""
        return tuple(self.scalars)

    def rows(self, rows: Any) -> Rows:
        """What training reads instead of the data's rows: those with whatever the objective draws on the host."""
        found: Rows = rows
        return found

    def evaluation_batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same for an evaluation."""
        return iter(batches)

    def planned(self, batch: Batch) -> Batch:
        """The same for a plan, which knows a batch's sizes alone: with as much as is to be expected."""
        return batch

    def weight(self, batch: Batch) -> Tensor:
        """() float: how much this batch counts, known before the forward pass: here the predicted tokens."""
        return batch.weights.sum(dtype=torch.float32)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """What the model is called with: tokens, segment ids and positions."""
        return batch.tokens, batch.segment_ids, batch.positions

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Batch) -> LossSum:
        """The loss of a batch with what `rows` drew. `models.layers.loss` has what a model's head gives."""
