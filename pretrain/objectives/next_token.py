"""Next-token prediction: cross-entropy of every token given those before it in its document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.layers.head import Head
from models.layers.loss import default_chunk_tokens, token_cross_entropy
from pretrain.objectives.base import LossSum

if TYPE_CHECKING:
    from data_pipelines.stream.batch import Batch
    from data_pipelines.stream.stream import Rows


@dataclass(frozen=True)
class NextToken:
    z_loss: float = 0.0

    parts = ()

    def rows(self, rows: Rows) -> Rows:
        """The rows as they are."""
        return rows

    def evaluation_batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches as they are."""
        return iter(batches)

    def weight(self, batch: Batch) -> Tensor:
        return batch.weights.sum(dtype=torch.float32)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return batch.tokens, batch.segment_ids, batch.positions

    def __call__(self, model: nn.Module, batch: Batch) -> LossSum:
        hidden_BTC = model(*self.inputs(batch))
        head: Head = model.head  # type: ignore[assignment]
        loss, z_term = token_cross_entropy(
            head,
            hidden_BTC,
            batch.targets,
            batch.weights,
            z_loss=self.z_loss,
            chunk_tokens=default_chunk_tokens(head.columns),
        )
        none = loss.new_zeros((0, 2), dtype=torch.float64)
        return LossSum(total=loss + z_term, loss=loss.detach(), parts=none)
