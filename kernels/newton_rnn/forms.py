"""Which form of a recurrence runs where."""

from __future__ import annotations

from torch import Tensor

from kernels.newton_rnn.torch_forms import Call, Forward, Gradients, torch_backward, torch_forward


def forward(call: Call) -> Forward:
    return torch_forward(call, newton=call.solver.method == "newton")


def backward(
    call: Call, output_BTD: Tensor, cells_BTD: Tensor | None, grad_BTD: Tensor, grad_final: Tensor
) -> Gradients:
    return torch_backward(call, output_BTD, cells_BTD, grad_BTD, grad_final)
