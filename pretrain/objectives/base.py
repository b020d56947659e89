"""What an objective is: a loss as a sum, and the weight to divide it by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from data_pipelines.batch import Batch


@dataclass(frozen=True)
class LossSum:
    """Summed, not averaged, over a micro-batch, so that splitting a batch never changes a loss.

    total: () what the backward pass starts from, regularisers included.
    loss: () the loss to report, in nats, without gradient.
    """

    total: Tensor
    loss: Tensor


class Objective(Protocol):
    def weight(self, batch: Batch) -> Tensor:
        """() float: how much this batch counts, known before the forward pass (here: predicted tokens)."""
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> LossSum: ...
