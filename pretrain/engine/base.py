"""What an engine is: the part that knows how a step is computed on many devices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.checkpoint.fragments import Fragment
from pretrain.errors import UserError

if TYPE_CHECKING:
    from data_pipelines.stream.batch import Batch
    from pretrain.objectives import Objective
    from pretrain.optim.scaling import Scaled
    from pretrain.parallel.mesh import Mesh


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. Tensors stay on the device until somebody logs them.

    A step whose gradient is not finite changes no weight, no moment and no counter of Adam's, in any engine.

    loss_sum: () this rank's share of the loss, in nats, summed over tokens.
    weight: () the whole step's token count, over all ranks.
    gradient_norm: () global norm before clipping; finite or not alike on all ranks.
    tokens: tokens that all ranks read in this step.
    parts: (P, 2) float64 this rank's share of the objective's parts: sums and weights.
    """

    loss_sum: Tensor
    weight: Tensor
    gradient_norm: Tensor
    tokens: int
    parts: Tensor


@dataclass(frozen=True)
class Evaluation:
    """Sums over all ranks. `parts`: of each of the objective's parts that has a weight, its mean."""

    loss_sum: float
    weight: float
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Nats per token. Raises UserError if nothing was predicted."""
        if not self.weight:
            raise UserError("the split has no token to predict: its documents are empty or one token long")
        return self.loss_sum / self.weight


def means(names: Sequence[str], parts: Tensor) -> dict[str, float]:
    """Sum over weight of each part that has a weight. The host waits for the device."""
    pairs = zip(names, parts.tolist(), strict=True)
    return {name: total / weight for name, (total, weight) in pairs if weight}


def weight_of_step(batch: Batch, objective: Objective, mesh: Mesh) -> Tensor:
    """() how much the rows of all ranks count. Collective over the replicas."""
    weight = objective.weight(batch)
    if mesh.replicas.size > 1:
        dist.all_reduce(weight, group=mesh.replicas.group)
    return weight


@contextlib.contextmanager
def without_gradients(modules: Sequence[nn.Module]) -> Iterator[None]:
    """The modules as they evaluate; afterwards they train again."""
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in modules:
            module.train()


class Engine(Protocol):
    """Besides what the methods say, an engine keeps the model's parameters within `model.bounds()` after every
    update, exactly and before any forward pass.

    scaled: the optimizer's settings as they are used.
    """

    scaled: Scaled

    def train_step(self, batch: Batch, objective: Objective, lr_factor: float) -> StepReport:
        """Forward, backward, clip and update on this rank's rows of one step."""
        ...

    def evaluate(self, batches: Iterable[Batch], objective: Objective) -> Evaluation:
        """Collective: every rank brings the same number of batches."""
        ...

    def inference(self) -> AbstractContextManager[nn.Module]:
        """The model, ready for forward passes of whole rows without gradients on all ranks at once."""
        ...

    def fragments(self) -> list[Fragment]:
        """Views of the state this rank owns, in the plain model's names. No collective, no copy."""
        ...

    def before_update(self, callback: Callable[[], object]) -> None:
        """Call this in every step just before anything changes that `fragments` shows.

        Forward and backward have run by then. The callback may be called several times in one step.
        """
        ...

    def after_load(self) -> None:
        """Bring the model's weights up to date with the state that was loaded into the fragments."""
        ...
