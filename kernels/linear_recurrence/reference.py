"""Linear recurrences by their definition, in time order: the form that every other form is compared with.

Shape suffixes: B batch, T time, D channels. A diagonal recurrence has one factor per channel, a (B, T, D);
a block recurrence has a 2x2 matrix per channel, a (B, T, 2, 2, D) as row, column, channel, and states
(B, T, 2, D).
"""

from __future__ import annotations

import torch
from torch import Tensor

DIAGONAL_DIMENSIONS = 3
BLOCK_DIMENSIONS = 5


def apply(a: Tensor, y: Tensor) -> Tensor:
    """a y: elementwise for a diagonal (..., D), a 2x2 product per channel for blocks (..., 2, 2, D)."""
    if a.dim() == y.dim():
        return a * y
    return a[..., 0, :] * y[..., :1, :] + a[..., 1, :] * y[..., 1:, :]


def compose(late: Tensor, early: Tensor, *, block: bool) -> Tensor:
    """The factor of two steps: late times early."""
    if not block:
        return late * early
    return late[..., 0, None, :] * early[..., :1, :, :] + late[..., 1, None, :] * early[..., 1:, :, :]


def transpose(a: Tensor, *, block: bool) -> Tensor:
    return a.transpose(-3, -2) if block else a


def linear_recurrence_reference(
    a: Tensor, b: Tensor, state: Tensor | None = None, *, reverse: bool = False
) -> Tensor:
    """y_t = a_t y_{t-1} + b_t from y_{-1} = state (zero if None); reverse: y_t = a_t y_{t+1} + b_t.

    a (B, T, D) with b (B, T, D) and state (B, D), or a (B, T, 2, 2, D) with b (B, T, 2, D) and state
    (B, 2, D). Returns y, shaped as b.
    """
    time = b.shape[1]
    y = torch.zeros_like(b[:, 0]) if state is None else state
    steps: list[Tensor] = []
    for t in reversed(range(time)) if reverse else range(time):
        y = apply(a[:, t], y) + b[:, t]
        steps.append(y)
    return torch.stack(steps[::-1] if reverse else steps, 1)
