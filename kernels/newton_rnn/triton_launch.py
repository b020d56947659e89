"""Launches the recurrence kernels: buffers, tiles, and the report from what the programs left.

Shape suffixes: B batch, T time, H input heads, G gates, N channels of a head, D = H N channels.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from kernels.devices import interpreting
from kernels.newton_rnn import tiles, triton_adjoint, triton_newton, triton_sequential
from kernels.newton_rnn.newton import keep_of, not_a_number_if
from kernels.newton_rnn.torch_forms import Call, Forward, Gradients


def newton_forward(call: Call) -> Forward:
    """Newton's method; where the policy says so, the sequential form behind it, which acts by a flag."""
    rows, time, width, channels = _sizes(call)
    solver = call.solver
    tile = tiles.tile_of(tiles.NEWTON[call.lstm], rows, width, solver.window)
    grid = (-(-width // tile.channels), rows)
    result = _buffers(call)
    partials = _floats(call, grid[0] * rows, 5)
    iterate = solver.on_exceed == "iterate"
    kernel = triton_newton.lstm_newton_kernel if call.lstm else triton_newton.gru_newton_kernel
    with _device(call):
        kernel[grid](
            *_inputs(call),
            *_outputs(result),
            partials,
            time,
            width,
            channels,
            solver.iterations,
            solver.max_iterations if iterate else solver.iterations,
            -1.0 if solver.tolerance is None else solver.tolerance,
            solver.limit,
            PROJECT=solver.project,
            **tile.options(),
            **_constants(call, tile.channels),
        )
    worst, total, iterations, norm, acted = partials.unbind(1)
    count = rows * time * width * (2 if call.lstm else 1)
    numbers = torch.stack([worst.amax(), total.sum() / count, iterations.amax(), norm.amax(), acted.amax()])
    if solver.on_exceed == "sequential":
        numbers = _solve_again(call, result, numbers)
    return Forward(*result[:3], _with_state_checked(call, numbers))


def sequential_forward(call: Call) -> Forward:
    result = _buffers(call)
    norm = _sequential(call, result, flag=None)
    residual, zero = not_a_number_if(result[2], norm), torch.zeros_like(norm)
    numbers = torch.stack([residual, residual, zero, norm, zero])
    return Forward(*result, _with_state_checked(call, numbers))


def parallel_backward(
    call: Call, output_BTD: Tensor, cells_BTD: Tensor | None, grad_BTD: Tensor, grad_final: Tensor
) -> Gradients:
    """The adjoint by a reverse scan over windows."""
    rows, _, width, _ = _sizes(call)
    tile = tiles.tile_of(tiles.ADJOINT[call.lstm], rows, width)
    module = triton_adjoint
    kernel = module.lstm_adjoint_kernel if call.lstm else module.gru_adjoint_kernel
    return _backward(call, kernel, tile.options(), [output_BTD, cells_BTD, grad_BTD, grad_final])


def sequential_backward(
    call: Call, output_BTD: Tensor, cells_BTD: Tensor | None, grad_BTD: Tensor, grad_final: Tensor
) -> Gradients:
    """The adjoint in reverse time order."""
    lanes = tiles.SEQUENTIAL_ADJOINT
    module = triton_sequential
    kernel = module.lstm_sequential_adjoint_kernel if call.lstm else module.gru_sequential_adjoint_kernel
    options = {"C": lanes.channels, "U": lanes.steps, "num_warps": lanes.warps}
    return _backward(call, kernel, options, [output_BTD, cells_BTD, grad_BTD, grad_final])


def _backward(call: Call, kernel: Any, options: dict[str, int], given: list[Tensor | None]) -> Gradients:
    rows, time, width, channels = _sizes(call)
    d_gates, d_state = torch.empty_like(call.gates_BTHGN), torch.empty_like(call.state)
    sums = _floats(call, rows, 8 if call.lstm else 6, width)
    with _device(call):
        kernel[(-(-width // options["C"]), rows)](
            *_inputs(call),
            *(x.contiguous() for x in given if x is not None),
            d_gates,
            d_state,
            sums,
            time,
            width,
            channels,
            **options,
            **_constants(call, options["C"]),
        )
    totals = sums.sum(0)
    recurrent, bias, peephole = totals[:3], totals[3:6], totals[6:]
    parameters = (recurrent, peephole, bias) if call.lstm else (recurrent, bias)
    return Gradients(d_gates, tuple(parameter.clone() for parameter in parameters), d_state)


def _sequential(call: Call, result: tuple[Tensor, Tensor | None, Tensor], flag: Tensor | None) -> Tensor:
    """Fills `result` in time order, unless the flag (1,) is 0; returns the greatest Jacobian norm."""
    rows, time, width, channels = _sizes(call)
    lanes = tiles.SEQUENTIAL
    norms = torch.zeros(rows, width, dtype=torch.float32, device=call.state.device)
    module = triton_sequential
    kernel = module.lstm_sequential_kernel if call.lstm else module.gru_sequential_kernel
    with _device(call):
        kernel[(-(-width // lanes.channels), rows)](
            *_inputs(call),
            *_outputs(result),
            norms,
            flag,
            time,
            width,
            channels,
            C=lanes.channels,
            U=lanes.steps,
            PREDICATED=flag is not None,
            num_warps=lanes.warps,
            **_constants(call, lanes.channels),
        )
    return norms.amax()


def _solve_again(call: Call, result: tuple[Tensor, Tensor | None, Tensor], numbers: Tensor) -> Tensor:
    """The sequential form where the residual exceeded the limit, and the report of what stands then."""
    exceeded = ~(numbers[0] <= call.solver.limit)
    norm = _sequential(call, result, exceeded.to(torch.int32)[None])
    residual = not_a_number_if(result[2], norm)
    again = torch.stack([residual, residual, numbers[2], norm, torch.ones_like(norm)])
    return torch.where(exceeded, again, numbers)


def _with_state_checked(call: Call, numbers: Tensor) -> Tensor:
    """An infinite residual if the initial state lies outside what iterates are projected onto.

    On a CPU that is a ValueError; here nobody waits for the device to say so.
    """
    if not call.solver.project:
        return numbers
    assert call.cell.project is not None
    outside = (call.state - call.cell.project(call.state)).abs().amax() > call.slack
    return torch.cat([torch.where(outside, float("inf"), numbers[:1]), numbers[1:]])


def _sizes(call: Call) -> tuple[int, int, int, int]:
    """Rows, time, width, channels of a head."""
    rows, time, heads, _, channels = call.gates_BTHGN.shape
    return rows, time, heads * channels, channels


def _floats(call: Call, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=call.state.device)


def _buffers(call: Call) -> tuple[Tensor, Tensor | None, Tensor]:
    """Output, the LSTM's cell states, final state."""
    rows, time, width, _ = _sizes(call)
    output_BTD = call.gates_BTHGN.new_empty(rows, time, width)
    cells_BTD = torch.empty_like(output_BTD) if call.lstm else None
    return output_BTD, cells_BTD, torch.empty_like(call.state)


def _outputs(result: tuple[Tensor, Tensor | None, Tensor]) -> list[Tensor]:
    return [tensor for tensor in result if tensor is not None]


def _inputs(call: Call) -> list[Tensor | None]:
    keep_BT = keep_of(call.segment_ids_BT)
    return [
        call.gates_BTHGN,
        *call.parameters,
        call.state,
        None if keep_BT is None else keep_BT.to(torch.uint8),
    ]


def _constants(call: Call, channels: int) -> dict[str, bool]:
    return {
        "SEGMENTS": call.segment_ids_BT is not None,
        "ONE_HEAD": call.gates_BTHGN.shape[4] % channels == 0,
        "APPROXIMATE": call.gates_BTHGN.dtype != torch.float32 and not interpreting(),
    }


def _device(call: Call) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors' own."""
    device = call.gates_BTHGN.device
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
