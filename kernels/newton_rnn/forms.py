"""Which form of a recurrence runs where."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels.newton_rnn import cpu
from kernels.newton_rnn.torch_forms import Call, Forward, Gradients, torch_backward, torch_forward


def forward(call: Call) -> Forward:
    if call.solver.method == "newton":
        return torch_forward(call, newton=True)
    library = _compiled(call)
    if library is not None:
        return cpu.compiled_forward(library, call)
    return torch_forward(call, newton=False)


def backward(
    call: Call, output_BTD: Tensor, cells_BTD: Tensor | None, grad_BTD: Tensor, grad_final: Tensor
) -> Gradients:
    library = _compiled(call)
    if library is not None:
        return cpu.compiled_backward(library, call, output_BTD, cells_BTD, grad_BTD, grad_final)
    return torch_backward(call, output_BTD, cells_BTD, grad_BTD, grad_final)


def _compiled(call: Call) -> ctypes.CDLL | None:
    """The compiled CPU form, which computes in fp32, where it can serve."""
    if call.gates_BTHGN.device.type != "cpu" or call.work_dtype != torch.float32:
        return None
    return cpu.library()
