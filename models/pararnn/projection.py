"""The projection by heads. Shape suffixes: M positions, H heads, I input features and O outputs of a head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def project_heads(x_MHI: Tensor, weight_HIO: Tensor) -> Tensor:
    """Each head's features by its own matrix: (M, H, O), contiguous.

    A batched product puts the heads first. The recurrence reads position by position, so eager mode has the
    product write there in place of a copy of all gates, forward and backward. The compiler plans its own.
    """
    if torch.compiler.is_compiling():
        return torch.bmm(x_MHI.transpose(0, 1), weight_HIO).transpose(0, 1).contiguous()
    out: Tensor = _ProjectHeads.apply(x_MHI, weight_HIO)
    return out


class _ProjectHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MHI: Tensor, weight_HIO: Tensor) -> Tensor:
        ctx.save_for_backward(x_MHI, weight_HIO)
        return _product(x_MHI, weight_HIO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MHO: Tensor) -> tuple[Tensor, Tensor]:
        x_MHI, weight_HIO = ctx.saved_tensors
        grad_weight_HIO = torch.bmm(x_MHI.permute(1, 2, 0), grad_MHO.transpose(0, 1))
        return _product(grad_MHO, weight_HIO.transpose(1, 2)), grad_weight_HIO


def _product(x_MHI: Tensor, weight_HIO: Tensor) -> Tensor:
    out_MHO = x_MHI.new_empty(*x_MHI.shape[:2], weight_HIO.shape[2])
    torch.bmm(x_MHI.transpose(0, 1), weight_HIO, out=out_MHO.transpose(0, 1))
    return out_MHO
