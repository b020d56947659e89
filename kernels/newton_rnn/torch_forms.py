"""The GRU and LSTM in plain torch, on tensors of the ops' shapes: the loop, Newton's method, and the adjoint.

Shape suffixes: B batch, T time, H input heads, G gates, N channels of a head, D = H N channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels.newton_rnn.cells import GRU, LSTM, Cell, Parameters, gru_pullback, lstm_pullback
from kernels.newton_rnn.newton import Problem, adjoint, keep_of, solve_by_newton, solve_sequentially
from kernels.newton_rnn.solver import Solver


@dataclass(frozen=True)
class Call:
    """One call of the gru or lstm op. Parameters and state are fp32 (fp64 if the gates are).

    parameters: recurrent (3, D), for the LSTM peephole (2, D), bias (3, D). state: (B, D) or (B, 2, D).
    """

    gates_BTHGN: Tensor
    parameters: Parameters
    state: Tensor
    segment_ids_BT: Tensor | None
    solver: Solver

    # A state that went through bfloat16 may lie outside the invariant set by its rounding: tanh 1 rounds up.
    slack: ClassVar[float] = 2e-4

    @property
    def lstm(self) -> bool:
        return self.state.dim() == 3

    @property
    def cell(self) -> Cell:
        return LSTM if self.lstm else GRU

    @property
    def work_dtype(self) -> torch.dtype:
        return torch.float64 if self.gates_BTHGN.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Forward:
    """output (B, T, D) and, for the LSTM, its cell states (B, T, D), in the gates' dtype; the final state;
    the numbers of a Report (5,).
    """

    output_BTD: Tensor
    cells_BTD: Tensor | None
    final_state: Tensor
    numbers: Tensor


@dataclass(frozen=True)
class Gradients:
    gates_BTHGN: Tensor
    parameters: Parameters
    state: Tensor


def torch_forward(call: Call, *, newton: bool) -> Forward:
    problem = _problem(call)
    solved = solve_by_newton(problem, call.solver) if newton else solve_sequentially(problem)
    final, dtype = solved.states[:, -1], call.gates_BTHGN.dtype
    if not call.lstm:
        return Forward(solved.states.to(dtype), None, final, solved.numbers)
    # Copies: what an op returns may share no memory.
    cells_BTD, output_BTD = (
        solved.states[:, :, index].to(dtype).clone(memory_format=torch.contiguous_format) for index in (0, 1)
    )
    return Forward(output_BTD, cells_BTD, final, solved.numbers)


def torch_backward(
    call: Call, output_BTD: Tensor, cells_BTD: Tensor | None, grad_BTD: Tensor, grad_final: Tensor
) -> Gradients:
    """Gradients at the stored states. grad_final: of the final state, (B, D) or (B, 2, D)."""
    problem = _problem(call)
    grad = grad_BTD.to(call.work_dtype)
    states = output_BTD.to(call.work_dtype)
    if cells_BTD is not None:
        states = torch.stack([cells_BTD.to(call.work_dtype), states], 2)
        grad = torch.stack([torch.zeros_like(grad), grad], 2)
    grad = torch.cat([grad[:, :-1], (grad[:, -1] + grad_final)[:, None]], 1)
    total, grad_state, previous = adjoint(problem, states, grad)
    pull = lstm_pullback if call.lstm else gru_pullback
    pullback = pull(problem.inputs, call.parameters, previous, total)
    return Gradients(
        _by_heads(pullback.inputs, call.gates_BTHGN),
        tuple(parameter.sum((0, 1)) for parameter in pullback.parameters),
        grad_state,
    )


def _problem(call: Call) -> Problem:
    inputs_BTGD = call.gates_BTHGN.to(call.work_dtype).permute(0, 1, 3, 2, 4).flatten(3)
    return Problem(call.cell, inputs_BTGD, call.parameters, call.state, keep_of(call.segment_ids_BT))


def _by_heads(inputs_BTGD: Tensor, gates_BTHGN: Tensor) -> Tensor:
    heads_last = inputs_BTGD.unflatten(3, (gates_BTHGN.shape[2], gates_BTHGN.shape[4]))
    return heads_last.permute(0, 1, 3, 2, 4).to(gates_BTHGN.dtype).contiguous()
