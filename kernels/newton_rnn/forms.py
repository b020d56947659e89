"""Which form of a recurrence runs where.

| device | dtype | "sequential" | "newton" | "auto" |
|---|---|---|---|---|
| GPU with Triton | 16 or 32 bits | fused kernel, in time order | fused Newton kernel | by shape (tiles.py) |
| CPU | 16 or 32 bits | C, or the torch loop without a compiler | torch | sequential |
| any other | any other | torch loop | torch | sequential on a CPU, else newton |

The adjoint is the same mathematics in all of them, and does not ask how the states were found.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels.devices import runs_triton
from kernels.newton_rnn import cpu, tiles
from kernels.newton_rnn.torch_forms import Call, Forward, Gradients, torch_backward, torch_forward


def forward(call: Call) -> Forward:
    method = call.solver.method
    if _fused(call):
        from kernels.newton_rnn import triton_launch

        if method == "newton" or (method == "auto" and tiles.newton_is_faster(*_shape(call))):
            return triton_launch.newton_forward(call)
        return triton_launch.sequential_forward(call)
    if method == "newton" or (method == "auto" and call.gates_BTHGN.device.type != "cpu"):
        return torch_forward(call, newton=True)
    library = _compiled(call)
    if library is not None:
        return cpu.compiled_forward(library, call)
    return torch_forward(call, newton=False)


def backward(
    call: Call, output_BTD: Tensor, cells_BTD: Tensor | None, grad_BTD: Tensor, grad_final: Tensor
) -> Gradients:
    given = (output_BTD, cells_BTD, grad_BTD, grad_final)
    if _fused(call):
        from kernels.newton_rnn import triton_launch

        if tiles.parallel_adjoint_is_faster(*_shape(call)):
            return triton_launch.parallel_backward(call, *given)
        return triton_launch.sequential_backward(call, *given)
    library = _compiled(call)
    if library is not None:
        return cpu.compiled_backward(library, call, *given)
    return torch_backward(call, *given)


def _shape(call: Call) -> tuple[int, int, int]:
    rows, time, heads, _, channels = call.gates_BTHGN.shape
    return rows, heads * channels, time


def _fused(call: Call) -> bool:
    """Whether the Triton kernels run: they compute in fp32."""
    return call.work_dtype == torch.float32 and runs_triton(call.gates_BTHGN)


def _compiled(call: Call) -> ctypes.CDLL | None:
    """The compiled CPU form, which computes in fp32, where it can serve."""
    if call.gates_BTHGN.device.type != "cpu" or call.work_dtype != torch.float32:
        return None
    return cpu.library()
