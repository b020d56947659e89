"""Weights kept within a bound, whoever holds them and however they are updated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def bounded(weight: Tensor, limit: float | None) -> Tensor:
    """The weight clamped to [-limit, limit]; as it is if the limit is None.

    The model never sees more than the bound, whatever an optimizer did to the weight. Within the bound, and at
    it, the gradient is that of the loss, so that the gradients of micro-batches and ranks add up to the whole
    step's: whoever trains sets weights that stepped over the bound back to it (`LanguageModel.bounds`). Where
    nobody does, a gradient that would push a weight beyond the bound further out is dropped, and one that leads
    back is kept: a plain clamp has no gradient out there, and would hold the weight for ever.
    """
    if limit is None:
        return weight
    out: Tensor = _Bounded.apply(weight, limit)
    return out


def saturation(weights: list[Tensor], limit: float | None) -> Tensor:
    """() fp32: the share of the elements that are at the bound or beyond it; 0 without a bound."""
    if limit is None:
        return weights[0].new_zeros((), dtype=torch.float32)
    # The limit in the weights' own dtype: 0.9 is 0.898 in bf16, and so is a weight at the bound.
    at_bound = [
        (weight.detach().abs() >= weight.new_full((), limit)).sum(dtype=torch.float32) for weight in weights
    ]
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
        seen = weight.clamp(-ctx.limit, ctx.limit)
        # Descent moves a weight against its gradient.
        outward = ((weight > seen) & (grad < 0)) | ((weight < seen) & (grad > 0))
        return grad.masked_fill(outward, 0.0), None
