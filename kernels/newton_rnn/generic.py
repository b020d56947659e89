"""Recurrences of a user's own cell, given by its step function alone.

Shape suffixes: B batch, T time, D channels; "..." stands for the inputs' own dimensions (a gate dimension,
say) between time and channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.newton_rnn.cells import Cell, Jacobian, Parameters, Projection, Step, Structure
from kernels.newton_rnn.newton import (
    Problem,
    adjoint,
    keep_of,
    solve_by_newton,
    solve_sequentially,
    step_gradients,
)
from kernels.newton_rnn.op import check_segment_ids
from kernels.newton_rnn.solver import Report, Solution, Solver
from kernels.newton_rnn.split import Exchange, split_recurrence
from kernels.newton_rnn.torch_forms import Call


def recurrence(
    step: Step,
    inputs_BTD: Tensor,
    parameters: Parameters,
    state: Tensor | None = None,
    *,
    structure: Structure = "diagonal",
    jacobian: Jacobian | None = None,
    project: Projection | None = None,
    segment_ids_BT: Tensor | None = None,
    solver: Solver | None = None,
    exchange: Exchange | None = None,
) -> Solution:
    """h_t = step(inputs_t, parameters, h_{t-1}) for every t, in plain torch, on any device.

    Args:
        step: (inputs (..., D), parameters, state) -> next state, elementwise over channels and for any leading
            dimensions; the state is (..., D) for "diagonal", (..., 2, D) for "block2". Check it once with
            `check_structure`.
        inputs_BTD: (B, T, ..., D) in fp32 or fp64.
        parameters: the step's weights, as the step expects them. Gradients flow to each.
        state: (B, D), or (B, 2, D) for "block2"; zeros if None.
        structure: "diagonal", one number of state per channel; "block2", two.
        jacobian: (inputs, parameters, state) -> d next state / d state, (..., D), or (..., 2, 2, D) as row (of
            the next state), column, channel. By forward differentiation of the step if None. Gradients are as
            right as it is: `check_structure` compares it with the step.
        project: onto the set that no step leaves, e.g. `lambda h: h.clamp(-1, 1)` for a step that ends in
            tanh; None if there is none.
        segment_ids_BT, solver: as for `gru`; "auto" means in time order on a CPU and Newton on a GPU. There the
            host waits once per call for the residual, and with a tolerance once per iteration.
        exchange: as for `gru`.

    Returns a Solution; its output is the state (B, T, D), for "block2" the second of the two numbers (as the
    LSTM's c, h), and the final state is whole. Raises ValueError naming the argument.
    """
    solver = Solver() if solver is None else solver
    for key, message in solver.problems():
        raise ValueError(f"solver.{key} {message}")
    if not isinstance(parameters, tuple):
        raise ValueError(f"parameters must be a tuple of tensors, got {type(parameters).__name__}")
    cell = _cell(step, structure, jacobian, project)
    if exchange is not None:
        return split_recurrence(cell, inputs_BTD, parameters, state, segment_ids_BT, solver, exchange)
    state = _checked_state(cell, inputs_BTD, state, solver)
    check_segment_ids(segment_ids_BT, inputs_BTD, "inputs")
    states, numbers = _Recurrence.apply(cell, solver, segment_ids_BT, state, inputs_BTD, *parameters)
    output_BTD = states[:, :, 1] if cell.block else states
    return Solution(output_BTD, states[:, -1], Report.of(numbers, solver))


def check_structure(
    step: Step,
    inputs_D: Tensor,
    parameters: Parameters,
    *,
    structure: Structure = "diagonal",
    jacobian: Jacobian | None = None,
    seed: int = 0,
) -> None:
    """Raise ValueError if the step mixes channels, which its declared structure says it does not.

    inputs_D: (..., D), one position's inputs, for their shape; values are drawn. The whole Jacobian at three
    random states is computed, D x D: call it when a model is built, not at every step.
    jacobian: as for `recurrence`; raises ValueError if it is not the step's, for then Newton may still
    converge, but every gradient is wrong.
    """
    generator = torch.Generator().manual_seed(seed)
    width = inputs_D.shape[-1]
    shape = (width,) if structure == "diagonal" else (2, width)
    doubles = tuple(parameter.detach().double().cpu() for parameter in parameters)
    for _ in range(3):
        inputs = torch.randn(inputs_D.shape, generator=generator, dtype=torch.float64)
        state = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
        whole = torch.func.jacrev(step, argnums=2)(inputs, doubles, state)
        if whole.shape != shape + shape:
            raise ValueError(
                f"step must return a state shaped as the state it was given, {shape}, "
                f"got {tuple(whole.shape[: -len(shape)])}"
            )
        channels = whole if structure == "diagonal" else whole.movedim(1, 2).flatten(0, 1).abs().amax(0)
        others = channels.abs() - torch.diag(torch.diag(channels.abs()))
        if float(others.max()) > 0:
            row, column = divmod(int(others.argmax()), width)
            raise ValueError(
                f"step mixes channels though it is declared {structure!r}: the next state of channel {row} "
                f"depends on the state of channel {column}. Move the mixing into the input projection"
            )
        if jacobian is not None:
            right = whole.diagonal() if structure == "diagonal" else whole.diagonal(dim1=1, dim2=3)
            _check_jacobian(jacobian(inputs, doubles, state), right)


def _check_jacobian(given: Tensor, right: Tensor) -> None:
    if given.shape != right.shape:
        raise ValueError(f"jacobian must return {tuple(right.shape)} here, got {tuple(given.shape)}")
    error = float((given - right).abs().max() / right.abs().max().clamp(min=1e-6))
    if not error <= 1e-6:
        raise ValueError(
            f"jacobian is not the derivative of step: it is off by {error:.1e} of the greatest entry. Correct it, "
            "or leave it out: then the step is differentiated"
        )


def _cell(step: Step, structure: Structure, jacobian: Jacobian | None, project: Projection | None) -> Cell:
    if structure not in ("diagonal", "block2"):
        raise ValueError(f"structure must be 'diagonal' or 'block2', got {structure!r}")

    def linearise(inputs: Tensor, parameters: Parameters, state: Tensor) -> tuple[Tensor, Tensor]:
        if jacobian is None:
            return _differentiate(step, structure, (inputs, parameters, state))
        return step(inputs, parameters, state), jacobian(inputs, parameters, state)

    return Cell(step, structure, linearise, project)


class _Recurrence(torch.autograd.Function):
    """Solved without a graph; differentiated by the adjoint, and by one step of all positions at once."""

    @staticmethod
    def forward(
        ctx: Any,
        cell: Cell,
        solver: Solver,
        segment_ids: Tensor | None,
        state: Tensor,
        inputs: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        problem = Problem(cell, inputs, parameters, state, keep_of(segment_ids))
        newton = solver.method == "newton" or (solver.method == "auto" and inputs.device.type != "cpu")
        solved = solve_by_newton(problem, solver) if newton else solve_sequentially(problem)
        ctx.cell = cell
        ctx.save_for_backward(segment_ids, state, inputs, solved.states, *parameters)
        ctx.mark_non_differentiable(solved.numbers)
        return solved.states, solved.numbers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        segment_ids, state, inputs, states, *parameters = ctx.saved_tensors
        problem = Problem(ctx.cell, inputs, tuple(parameters), state, keep_of(segment_ids))
        total, grad_state, previous = adjoint(problem, states, grad)
        return None, None, None, grad_state, *step_gradients(problem, previous, total)


def _differentiate(
    step: Step, structure: Structure, point: tuple[Tensor, Parameters, Tensor]
) -> tuple[Tensor, Tensor]:
    """Next state and Jacobian at a point: one forward derivative per number of the state of a channel."""
    inputs, parameters, state = point

    def of_state(given: Tensor) -> Tensor:
        return step(inputs, parameters, given)

    def along(direction: Tensor) -> tuple[Tensor, Tensor]:
        value, derivative = torch.func.jvp(of_state, (state,), (direction,))[:2]
        return value, derivative

    if structure == "diagonal":
        return along(torch.ones_like(state))
    columns = []
    for number in range(2):
        direction = torch.zeros_like(state)
        direction[..., number, :] = 1.0
        value, column = along(direction)
        columns.append(column)
    return value, torch.stack(columns, -2)


def _checked_state(cell: Cell, inputs: Tensor, state: Tensor | None, solver: Solver) -> Tensor:
    if inputs.dim() < 3 or 0 in inputs.shape:
        raise ValueError(
            f"inputs must be (batch, time, ..., channels), none of size 0 (a sequence of length 0?), "
            f"got shape {tuple(inputs.shape)}"
        )
    if inputs.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"inputs must be float32 or float64, got {inputs.dtype}")
    batch, width = inputs.shape[0], inputs.shape[-1]
    shape = (batch, 2, width) if cell.block else (batch, width)
    if state is None:
        return inputs.new_zeros(shape)
    if state.shape != shape:
        raise ValueError(f"state must be {shape}, for the {batch} rows of inputs; got {tuple(state.shape)}")
    if solver.project and cell.project is not None and state.device.type == "cpu":
        excess = float((state.detach() - cell.project(state.detach())).abs().max())
        if excess > Call.slack:
            raise ValueError(
                f"state lies outside the cell's invariant set by {excess:.1e}: pass a final state of this cell, "
                "or set project to false"
            )
    return state.to(inputs.dtype)
