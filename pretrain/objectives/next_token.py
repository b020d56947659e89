"""Next-token prediction: cross-entropy of every token given those before it in its document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import nn

from models.layers.head import Head
from models.layers.loss import default_chunk_tokens, token_cross_entropy
from pretrain.config.objective import NextTokenSection
from pretrain.objectives.base import LossSum, Objective

if TYPE_CHECKING:
    from data_pipelines.stream.batch import Batch
    from data_pipelines.tokens.vocabulary import Vocabulary
    from pretrain.config import Config


@dataclass(frozen=True)
class NextToken(Objective):
    z_loss: float = 0.0

    @classmethod
    def build(cls, config: Config, vocabulary: Vocabulary | None) -> Self:
        assert isinstance(config.objective, NextTokenSection)
        return cls(z_loss=config.objective.z_loss)

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
