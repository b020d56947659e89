"""Weights kept within a bound, whoever holds them and however they are updated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def bounded(weight: Tensor, limit: float | None) -> Tensor:
    """The weight clamped to [-limit, limit]; as it is if the limit is None.

    The optimizer's own weight may step over the bound; the model never sees more than the bound. A gradient is
    dropped only where it would push a weight that is at the bound further out, so that weights come back: a
    plain clamp has no gradient out there, and would hold them for ever. Nothing else is needed under ZeRO,
    where no rank has all of the weights to clip. The rule is applied to the gradient of each micro-batch.
    """
    if limit is None:
        return weight
    out: Tensor = _Bounded.apply(weight, limit)
    return out


def saturation(weights: list[Tensor], limit: float | None) -> Tensor:
    """() fp32: the share of the elements that are at the bound or beyond it; 0 without a bound."""
    if limit is None:
        return weights[0].new_zeros((), dtype=torch.float32)
    at_bound = [(weight.detach().abs() >= limit).sum(dtype=torch.float32) for weight in weights]
    return torch.stack(at_bound).sum() / sum(weight.numel() for weight in weights)


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.limit = limit
        return weight.clamp(-limit, limit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        # Descent moves a weight against its gradient.
        outward = ((weight >= ctx.limit) & (grad < 0)) | ((weight <= -ctx.limit) & (grad > 0))
        return grad.masked_fill(outward, 0.0), None
