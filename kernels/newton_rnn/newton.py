"""The two ways to solve h_t = f(h_{t-1}, x_t) in plain torch, for any cell.

In time order, or by Newton's method on all positions at once (Danieli et al., eq. 2.2-2.4): from the guess
f(0, x_t), repeat
    r_t = f(h_{t-1}, x_t) - h_t,   J_t = df/dh (h_{t-1}, x_t),   d_t = J_t d_{t-1} + r_t,   h_t += d_t
where the linear recurrence for d is what can be computed in parallel. Each iterate is projected onto the set
that states never leave; where it overflowed, the position takes the step f(h_{t-1}, x_t) itself.

Shape suffixes: B batch, T time, D channels. States are (B, T, D), or (B, T, 2, D) for block cells; one state
is (B, D) or (B, 2, D). keep (B, T) is False where a segment begins inside a row: there h_{t-1} is 0 and J_t is
cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.linear_recurrence.chunked import chunked_linear_recurrence
from kernels.linear_recurrence.reference import apply
from kernels.newton_rnn.cells import Cell, Parameters
from kernels.newton_rnn.solver import Solver


@dataclass(frozen=True)
class Problem:
    """One call: the cell, inputs (B, T, ...), parameters, initial state and where segments continue."""

    cell: Cell
    inputs: Tensor
    parameters: Parameters
    state: Tensor
    keep_BT: Tensor | None

    @property
    def time(self) -> int:
        return self.inputs.shape[1]

    def window(self, start: int, end: int, state: Tensor) -> Problem:
        keep_BT = None if self.keep_BT is None else self.keep_BT[:, start:end]
        return Problem(self.cell, self.inputs[:, start:end], self.parameters, state, keep_BT)

    def kept(self, x: Tensor) -> Tensor:
        """x (B, T, ...) with zeros where a segment begins."""
        if self.keep_BT is None:
            return x
        # Not a product: what is cut may be infinite while Newton iterates.
        return x.where(self.keep_BT.reshape(self.keep_BT.shape + (1,) * (x.dim() - 2)), torch.zeros_like(x))

    def previous(self, states: Tensor) -> Tensor:
        """h_{t-1} for every t."""
        return self.kept(torch.cat([self.state[:, None], states[:, :-1]], 1))


@dataclass(frozen=True)
class Solved:
    """States (B, T, ...) and the numbers of a Report (5,)."""

    states: Tensor
    numbers: Tensor


def keep_of(segment_ids_BT: Tensor | None) -> Tensor | None:
    """False where the segment differs from the one before; the initial state belongs to position 0."""
    if segment_ids_BT is None:
        return None
    keep_BT = torch.ones_like(segment_ids_BT, dtype=torch.bool)
    keep_BT[:, 1:] = segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1]
    return keep_BT


def solve_sequentially(problem: Problem) -> Solved:
    """In time order."""
    state = problem.state
    states = []
    for t in range(problem.time):
        if problem.keep_BT is not None:
            keep_B1 = problem.keep_BT[:, t].reshape((-1,) + (1,) * (state.dim() - 1))
            state = state.where(keep_B1, torch.zeros_like(state))
        state = problem.cell.step(problem.inputs[:, t], problem.parameters, state)
        states.append(state)
    stacked = torch.stack(states, 1)
    numbers = torch.zeros(5, dtype=torch.float32, device=stacked.device)
    jacobian = problem.cell.linearise(problem.inputs, problem.parameters, problem.previous(stacked))[1]
    numbers[3] = jacobian_norm(jacobian, problem.cell)
    numbers[:2] = not_a_number_if(state, numbers[3])
    return Solved(stacked, numbers)


def not_a_number_if(final_state: Tensor, norm: Tensor) -> Tensor:
    """The residual of states computed in time order: 0, unless the state at the end or a Jacobian is not finite.

    norm: the greatest of the Jacobians, for what a segment's start has cut off from the end.
    """
    return (final_state.abs().amax() * 0 + norm * 0).to(torch.float32)


def solve_by_newton(problem: Problem, solver: Solver) -> Solved:
    """By Newton's method, window by window, with the solver's policy where a window's residual exceeds."""
    length = solver.window or problem.time
    state, parts, reports = problem.state, [], []
    for start in range(0, problem.time, length):
        end = min(start + length, problem.time)
        solved = _solve_window(problem.window(start, end, state), solver)
        if solver.on_exceed == "sequential" and not bool(solved.numbers[0] <= solver.limit):
            again = solve_sequentially(problem)
            again.numbers[2], again.numbers[4] = solved.numbers[2], 1.0
            return again
        state = solved.states[:, -1]
        parts.append(solved.states)
        reports.append(torch.cat([solved.numbers, solved.numbers.new_tensor([(end - start) / problem.time])]))
    table = torch.stack(reports)
    numbers = table[:, :5].amax(0)
    numbers[1] = (table[:, 1] * table[:, 5]).sum()
    return Solved(torch.cat(parts, 1), numbers)


def _solve_window(problem: Problem, solver: Solver) -> Solved:
    states = guess(problem)
    taken, acted = 0, False
    while True:
        value, jacobian = problem.cell.linearise(problem.inputs, problem.parameters, problem.previous(states))
        residual = value - states
        worst = residual.abs().amax()
        wanted, exceeded = go_on(worst, taken, solver)
        acted |= exceeded
        if not wanted:
            break
        states = _iterate(problem, states, value, cut(problem, jacobian), solver.project)
        taken += 1
    worst = torch.where(worst.isnan(), torch.full_like(worst, float("inf")), worst)
    numbers = torch.zeros(5, dtype=torch.float32, device=states.device)
    numbers[0], numbers[1], numbers[2], numbers[4] = worst, residual.abs().mean(), taken, acted
    numbers[3] = jacobian_norm(jacobian, problem.cell)
    return Solved(states, numbers)


def go_on(worst: Tensor, taken: int, solver: Solver) -> tuple[bool, bool]:
    """Whether to iterate once more, and whether the policy has taken over. Comparisons fail for NaN."""
    if taken < solver.iterations:
        return solver.tolerance is None or not bool(worst <= solver.tolerance), False
    exceeded = not bool(worst <= solver.limit)
    return exceeded and solver.on_exceed == "iterate" and taken < solver.max_iterations, exceeded


def guess(problem: Problem) -> Tensor:
    zeros = torch.zeros_like(problem.state)[:, None].expand(-1, problem.time, *problem.state.shape[1:])
    return problem.cell.step(problem.inputs, problem.parameters, problem.previous(zeros))


def cut(problem: Problem, jacobian: Tensor) -> Tensor:
    """J_t is 0 where h_{t-1} is known: at a segment's start, and at the window's start."""
    jacobian = problem.kept(jacobian)
    return torch.cat([torch.zeros_like(jacobian[:, :1]), jacobian[:, 1:]], 1)


def _iterate(problem: Problem, states: Tensor, value: Tensor, jacobian: Tensor, project: bool) -> Tensor:
    states = states + chunked_linear_recurrence(jacobian, value - states)
    if not project or problem.cell.project is None:
        return states
    return problem.cell.project(states.where(states.isfinite(), value))


def jacobian_norm(jacobian: Tensor, cell: Cell) -> Tensor:
    """The greatest row sum of absolute values over all positions and channels."""
    magnitude = jacobian.abs()
    return (magnitude.sum(-2) if cell.block else magnitude).amax()


def adjoint(problem: Problem, states: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The exact gradient of the recurrence at its states, whichever way they were found.

    grad (B, T, ...): of every state, the final state's added at the end. Returns the total gradient of every
    state, l_t = g_t + J_{t+1}^T l_{t+1}; that of the initial state, J_0^T l_0; and the previous states.
    Source: Danieli et al., eq. 2.6.
    """
    transposed, previous = transposed_jacobians(problem, states)
    total, grad_state = backwards(transposed, grad)
    return total, grad_state, previous


def transposed_jacobians(problem: Problem, states: Tensor) -> tuple[Tensor, Tensor]:
    """J_t^T at every position, 0 where a segment begins, and the previous states."""
    previous = problem.previous(states)
    _, jacobian = problem.cell.linearise(problem.inputs, problem.parameters, previous)
    transposed = jacobian.transpose(-3, -2) if problem.cell.block else jacobian
    return problem.kept(transposed), previous


def backwards(transposed: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """l_t = g_t + J_{t+1}^T l_{t+1} for every t, and J_0^T l_0."""
    following = torch.cat([transposed[:, 1:], torch.zeros_like(transposed[:, :1])], 1)
    total = chunked_linear_recurrence(following, grad, reverse=True)
    return total, apply(transposed[:, 0], total[:, 0])


def step_gradients(problem: Problem, previous: Tensor, total: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs and of each parameter through one step of all positions at once.

    total: the gradient of every state, as `adjoint` gives it.
    """
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in (problem.inputs, *problem.parameters)]
    with torch.enable_grad():
        following = problem.cell.step(leaves[0], tuple(leaves[1:]), previous)
    return torch.autograd.grad(following, leaves, total, allow_unused=True)
