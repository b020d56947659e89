"""What an objective is: a loss as a sum, and the weight to divide it by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from data_pipelines.stream.batch import Batch
    from data_pipelines.stream.stream import Rows


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


class Objective(Protocol):
    @property
    def parts(self) -> tuple[str, ...]:
        """Names of what is logged beside the loss, each a sum over its own weight; in `monitoring.SCALARS`."""
        ...

    def rows(self, rows: Any) -> Rows:
        """What training reads instead of the data's rows: those with whatever the objective draws on the host."""
        ...

    def evaluation_batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same for an evaluation."""
        ...

    def weight(self, batch: Batch) -> Tensor:
        """() float: how much this batch counts, known before the forward pass (e.g. predicted tokens)."""
        ...

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """What the model is called with: tokens, segment ids and positions."""
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> LossSum: ...
