"""How often a model's most likely answer is the right one. B rows, T time, C width."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from data_pipelines.stream.batch import Batch


@dataclass(frozen=True)
class Accuracy:
    """Shares, from 0 to 1."""

    token: float
    """Of all answers."""
    last: float
    """Of the last answer of each row: on state-tracking tasks it needs all of the row."""
    sequence: float
    """Of the rows with every answer right."""


@torch.no_grad()
def count_right(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> Tensor:
    """(3, 2) float64 on `device`: right ones and all, of answers, last answers and rows."""
    counts = torch.zeros(3, 2, dtype=torch.float64, device=device)
    for batch in batches:
        counts += _count(model, batch.to(device))
    return counts


def _count(model: nn.Module, batch: Batch) -> Tensor:
    hidden_BTC = model(batch.tokens, batch.segment_ids, batch.positions)
    best_BT = model.head(hidden_BTC).argmax(-1)  # type: ignore[operator]
    scored_BT = batch.weights
    right_BT = (best_BT == batch.targets) & scored_BT
    last_BT = scored_BT & (scored_BT.flip(1).cumsum(1).flip(1) == 1)
    asked_B = scored_BT.any(1)
    perfect_B = asked_B & (right_BT == scored_BT).all(1)
    pairs = [(right_BT, scored_BT), (right_BT & last_BT, last_BT), (perfect_B, asked_B)]
    return torch.stack([torch.stack([right.sum(), all_.sum()]) for right, all_ in pairs]).double()


def accuracy_of(counts: Tensor) -> Accuracy:
    """From the sums of `count_right`."""
    token, last, sequence = (counts[:, 0] / counts[:, 1].clamp(min=1)).tolist()
    return Accuracy(token, last, sequence)
