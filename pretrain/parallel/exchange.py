"""What ranks that share rows tell each other: a few collectives over one axis, and their gradients.

Shape suffixes: P ranks of the axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.parallel.mesh import Axis


class Exchange:
    """The collectives of one axis, on plain tensors and without gradients.

    All are called by all ranks of the axis, in the same order and with tensors of the same shape and dtype.
    """

    def __init__(self, axis: Axis) -> None:
        self._group = axis.group
        self.rank = axis.rank
        self.size = axis.size

    def gather(self, x: Tensor) -> Tensor:
        """Everybody's x, (P, *x.shape)."""
        out = x.new_empty(self.size * x.numel())
        dist.all_gather_into_tensor(out, x.contiguous().view(-1), group=self._group)
        return out.view(self.size, *x.shape)

    def scatter_sum(self, x_P: Tensor) -> Tensor:
        """x_P[p] of all ranks summed, at rank p."""
        out = torch.empty_like(x_P[0], memory_format=torch.contiguous_format)
        dist.reduce_scatter_tensor(out.view(-1), x_P.contiguous().view(-1), group=self._group)
        return out

    def swap(self, x_P: Tensor) -> Tensor:
        """x_P[q] goes to rank q: what comes back at [q] is rank q's."""
        out = torch.empty_like(x_P, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x_P.contiguous(), group=self._group)
        return out

    def from_left(self, x: Tensor) -> Tensor:
        """The x of the rank before; zeros at the first."""
        return self._shift(x, 1)

    def from_right(self, x: Tensor) -> Tensor:
        """The x of the rank after; zeros at the last."""
        return self._shift(x, -1)

    def maximum(self, x: Tensor) -> Tensor:
        """The elementwise maximum of all ranks' x; infinity where one is not a number."""
        # A maximum over ranks may lose a NaN.
        out = x.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        dist.all_reduce(out, op=dist.ReduceOp.MAX, group=self._group)
        return out

    def _shift(self, x: Tensor, by: int) -> Tensor:
        # An all-to-all in which each rank has something for one other: in order with the axis' other collectives,
        # where separate sends and receives would have to be.
        sends, receives = [0] * self.size, [0] * self.size
        if 0 <= self.rank + by < self.size:
            sends[self.rank + by] = x.numel()
        if 0 <= self.rank - by < self.size:
            receives[self.rank - by] = x.numel()
        out = x.new_zeros(x.numel())
        dist.all_to_all_single(
            out[: sum(receives)], x.contiguous().view(-1)[: sum(sends)], receives, sends, group=self._group
        )
        return out.view(x.shape)


def gather(exchange: Exchange, x: Tensor) -> Tensor:
    """`Exchange.gather` with its gradient: each rank's x gets the sum of what all ranks made of it."""
    out: Tensor = _Differentiable.apply(x, exchange.gather, exchange.scatter_sum)
    return out


def swap(exchange: Exchange, x_P: Tensor) -> Tensor:
    """`Exchange.swap` with its gradient, which is a swap."""
    out: Tensor = _Differentiable.apply(x_P, exchange.swap, exchange.swap)
    return out


def from_left(exchange: Exchange, x: Tensor) -> Tensor:
    """`Exchange.from_left` with its gradient, which goes back to the left."""
    out: Tensor = _Differentiable.apply(x, exchange.from_left, exchange.from_right)
    return out


class _Differentiable(torch.autograd.Function):
    """A collective that is linear in x, and its transpose."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, collective: Callable[[Tensor], Tensor], transpose: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.transpose = transpose
        return collective(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transpose(grad), None, None
