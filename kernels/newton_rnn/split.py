"""Recurrences over sequences of which others hold the other parts: Newton's method and the adjoint, part by part.

With a part's first position s and its last e, Newton's update d_t = J_t d_{t-1} + r_t crosses parts as one number per
channel, the carry c = d_{s-1}: a part joins its own steps to the one step d_e = P c + D, all parts tell each other
(P, D), and each folds those before it. So every iteration costs one exchange of a few numbers per channel, whatever
the length. A part keeps a copy of h_{s-1}: it is asked for once, at the guess, and then follows from the carry as its
holder's own does. Gradients go the other way, l_{s-1} gets J_s^T l_s, in one exchange.

Where a document begins, J_t is 0: P is 0 in every part with a beginning, and the carry is cut exactly. All is computed
in fp32 or wider. States agree with those of whole sequences to rounding, for the sums are formed in another order.

Shape suffixes: B batch, T positions of a part, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear_recurrence.chunked import chunked_linear_recurrence, total_step
from kernels.linear_recurrence.reference import apply, step
from kernels.newton_rnn.cells import Cell, Parameters
from kernels.newton_rnn.newton import (
    Problem,
    backwards,
    cut,
    go_on,
    guess,
    jacobian_norm,
    keep_of,
    step_gradients,
    transposed_jacobians,
)
from kernels.newton_rnn.solver import Report, Solution, Solver, split_problems


class Exchange(Protocol):
    """What the holders of the parts, from left to right, tell each other. All of them call a method at once, with
    tensors of the same shape."""

    rank: int
    size: int

    def gather(self, x: Tensor) -> Tensor:
        """Everybody's x, (size, *x.shape)."""
        ...

    def from_left(self, x: Tensor) -> Tensor:
        """The x of the part before; zeros for the first."""
        ...

    def maximum(self, x: Tensor) -> Tensor:
        """The elementwise maximum of everybody's x; infinity where one is not a number."""
        ...


def split_recurrence(
    cell: Cell,
    inputs_BTD: Tensor,
    parameters: Parameters,
    state: Tensor | None,
    segment_ids_BT: Tensor | None,
    solver: Solver,
    exchange: Exchange,
) -> Solution:
    """h_t = step(inputs_t, parameters, h_{t-1}) for the positions of one part, by Newton's method.

    Args:
        inputs_BTD: (B, T, ..., D) in fp32 or fp64: the part's.
        segment_ids_BT: (B, size * T), those of the whole sequences.

    Returns a Solution of the part; its final state is that after the part. The residual's maximum is that of all
    parts. Raises ValueError for an initial state and for a solver that is not Newton's on all positions at once.
    """
    if state is not None:
        raise ValueError(
            "an initial state cannot be used with an exchange: sequences begin in their first part"
        )
    for key, message in split_problems(solver):
        raise ValueError(f"solver.{key} {message}")
    keep_BT = _keep(segment_ids_BT, inputs_BTD.shape[1], exchange)
    states, numbers = _SplitRecurrence.apply(cell, solver, exchange, keep_BT, inputs_BTD, *parameters)
    output_BTD = states[:, :, 1] if cell.block else states
    return Solution(output_BTD, states[:, -1], Report.of(numbers, solver))


def _keep(segment_ids: Tensor | None, time: int, exchange: Exchange) -> Tensor | None:
    """The part's keep (B, T): False where a segment begins, at its first position too."""
    if segment_ids is None:
        return None
    wanted = exchange.size * time
    if segment_ids.shape[1] != wanted:
        raise ValueError(
            f"segment_ids must be of all {wanted} positions of the sequences, got {tuple(segment_ids.shape)}"
        )
    keep = keep_of(segment_ids)
    assert keep is not None
    return keep[:, exchange.rank * time : (exchange.rank + 1) * time]


@dataclass(frozen=True)
class _Found:
    """States of the part, the state before it as its holder has it, and the numbers of a Report (5,)."""

    states: Tensor
    before: Tensor
    numbers: Tensor


def _solve(problem: Problem, solver: Solver, exchange: Exchange) -> _Found:
    """problem.state: zeros."""
    states = guess(problem)
    before = exchange.from_left(states[:, -1])
    taken, acted = 0, False
    while True:
        here = replace(problem, state=before)
        value, jacobian = problem.cell.linearise(problem.inputs, problem.parameters, here.previous(states))
        residual = value - states
        worst = residual.abs().amax()
        if taken >= solver.iterations or solver.tolerance is not None:
            worst = exchange.maximum(worst)  # one decision for all parts
        wanted, exceeded = go_on(worst, taken, solver)
        acted |= exceeded
        if not wanted:
            break
        jacobian = problem.kept(jacobian)
        carry, value_before = _carry(jacobian, residual, value, exchange)
        first = step(jacobian[:, 0], carry, residual[:, 0])[:, None]
        residual = torch.cat((first, residual[:, 1:]), 1)
        update = chunked_linear_recurrence(cut(problem, jacobian), residual)
        states = _projected(problem.cell, states + update, value, solver)
        before = _projected(problem.cell, before + carry, value_before, solver)
        taken += 1
    numbers = torch.zeros(5, dtype=torch.float32, device=states.device)
    numbers[0], numbers[1], numbers[2], numbers[4] = worst, residual.abs().mean(), taken, acted
    numbers[3] = jacobian_norm(jacobian, problem.cell)
    return _Found(states, before, numbers)


def _projected(cell: Cell, states: Tensor, value: Tensor, solver: Solver) -> Tensor:
    if not solver.project or cell.project is None:
        return states
    return cell.project(states.where(states.isfinite(), value))


def _carry(jacobian: Tensor, residual: Tensor, value: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """The update of the state before this part, and the plain step to it, which replaces an overflow. One exchange."""
    product, total = total_step(jacobian, residual)
    parts = _all_parts(exchange, product, total, value[:, -1])
    carry = value_before = torch.zeros_like(total)
    for product, total, last_value in parts[: exchange.rank]:
        carry, value_before = step(product, carry, total), last_value
    return carry, value_before


def _arriving(transposed: Tensor, grad: Tensor, exchange: Exchange) -> Tensor:
    """J_{e+1}^T l_{e+1}, the gradient of the part's last state from the parts after it. One exchange."""
    product, total = total_step(transposed.flip(1), apply(transposed, grad).flip(1))
    parts = _all_parts(exchange, product, total)
    arriving = torch.zeros_like(total)
    for product, total in reversed(parts[exchange.rank + 1 :]):
        arriving = step(product, arriving, total)
    return arriving


def _all_parts(exchange: Exchange, *tensors: Tensor) -> list[list[Tensor]]:
    """Tensors (B, ..., D) of all parts, by part, in one exchange."""
    shapes = [x.shape[1:-1] for x in tensors]
    flat = [x.reshape(x.shape[0], -1, x.shape[-1]) for x in tensors]
    sizes = [x.shape[1] for x in flat]
    everybody = exchange.gather(torch.cat(flat, 1)).split(sizes, dim=2)
    return [
        [
            x[number].unflatten(1, shape) if shape else x[number, :, 0]
            for x, shape in zip(everybody, shapes, strict=True)
        ]
        for number in range(exchange.size)
    ]


class _SplitRecurrence(torch.autograd.Function):
    """Solved without a graph; differentiated by the adjoint, and by one step of all positions at once."""

    @staticmethod
    def forward(
        ctx: Any,
        cell: Cell,
        solver: Solver,
        exchange: Exchange,
        keep: Tensor | None,
        inputs: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        batch, width = inputs.shape[0], inputs.shape[-1]
        zeros = inputs.new_zeros((batch, 2, width) if cell.block else (batch, width))
        found = _solve(Problem(cell, inputs, parameters, zeros, keep), solver, exchange)
        ctx.cell, ctx.exchange = cell, exchange
        ctx.save_for_backward(keep, found.before, inputs, found.states, *parameters)
        ctx.mark_non_differentiable(found.numbers)
        return found.states, found.numbers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        keep, before, inputs, states, *parameters = ctx.saved_tensors
        problem = Problem(ctx.cell, inputs, tuple(parameters), before, keep)
        transposed, previous = transposed_jacobians(problem, states)
        last = grad[:, -1] + _arriving(transposed, grad, ctx.exchange)
        total, _ = backwards(transposed, torch.cat((grad[:, :-1], last[:, None]), 1))
        return None, None, None, None, *step_gradients(problem, previous, total)
