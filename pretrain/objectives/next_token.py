"""Next-token prediction: cross-entropy of every token given those before it in its document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.layers.loss import default_chunk_tokens, token_cross_entropy
from pretrain.objectives.base import LossSum

if TYPE_CHECKING:
    from data_pipelines.batch import Batch


@dataclass(frozen=True)
class NextToken:
    z_loss: float = 0.0

    def weight(self, batch: Batch) -> Tensor:
        return batch.weights.sum(dtype=torch.float32)

    def __call__(self, model: nn.Module, batch: Batch) -> LossSum:
        hidden_BTC = model(batch.tokens, batch.segment_ids, batch.positions)
        head: nn.Linear = model.head  # type: ignore[assignment]
        loss, z_term = token_cross_entropy(
            head,
            hidden_BTC,
            batch.targets,
            batch.weights,
            z_loss=self.z_loss,
            chunk_tokens=default_chunk_tokens(head.out_features),
        )
        return LossSum(total=loss + z_term, loss=loss.detach())
