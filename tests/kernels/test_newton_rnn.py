"""The GRU and LSTM recurrences: every form against the loop in float64, gradients, resets, policies, errors.

Shape suffixes: B batch, T time, H input heads, G gates, N channels of a head, D = H N channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.newton_rnn import NewtonError, Solver, check_structure, gru, gru_step, lstm_step, recurrence
from kernels.newton_rnn.cells import GRU, LSTM, Step, Structure
from kernels.newton_rnn.newton import Problem, keep_of
from tests.kernels.newton_problems import Arguments, Shape, arguments, results, solve

CELLS = ("gru", "lstm")
SEQUENTIAL = Solver(method="sequential")
CONVERGED = Solver(method="newton", iterations=12, tolerance=1e-13)


def by_definition(given: Arguments, seed: int = 9) -> dict[str, Tensor]:
    """As `results`, by autograd through a plain loop over time."""
    gates, *parameters, state = given.tensors
    cell = LSTM if given.cell == "lstm" else GRU
    inputs = gates.permute(0, 1, 3, 2, 4).flatten(3)
    keep = keep_of(given.segment_ids)
    h, outputs = state, []
    for t in range(gates.shape[1]):
        if keep is not None:
            h = h * keep[:, t].reshape((-1,) + (1,) * (h.dim() - 1))
        h = cell.step(inputs[:, t], tuple(parameters), h)
        outputs.append(h)
    output = torch.stack(outputs, 1)
    output = output[:, :, 1] if cell.block else output
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (output, h)]
    grads = torch.autograd.grad([output, h], given.tensors, cotangents)
    found = {"output": output.detach(), "final state": h.detach()}
    return found | {f"gradient {index}": grad for index, grad in enumerate(grads)}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, right in expected.items():
        scale = right.abs().max().clamp(min=1.0)
        error = float((actual[name].double() - right.double()).abs().max() / scale)
        assert error <= tolerance, f"{name} differs by {error:.1e}"


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("solver", [SEQUENTIAL, CONVERGED, replace(CONVERGED, window=5)])
def test_outputs_and_gradients_equal_autograd_through_a_loop(
    cell: str, segments: bool, solver: Solver
) -> None:
    call = arguments(Shape(cell=cell, segments=segments))
    assert_equal(results(call, solver), by_definition(call), 1e-11)


@settings(max_examples=40, deadline=None)
@given(
    cell=st.sampled_from(CELLS),
    batch=st.integers(1, 3),
    time=st.integers(1, 40),
    heads=st.integers(1, 3),
    channels=st.integers(1, 4),
    segments=st.booleans(),
    window=st.none() | st.integers(1, 50),
    seed=st.integers(0, 2**16),
)
def test_any_shape_equals_autograd_through_a_loop(
    cell: str,
    batch: int,
    time: int,
    heads: int,
    channels: int,
    segments: bool,
    window: int | None,
    seed: int,
) -> None:
    shape = Shape(cell=cell, batch=batch, time=time, heads=heads, channels=channels, segments=segments)
    call = arguments(shape, seed)
    expected = by_definition(call)
    assert_equal(results(call, replace(CONVERGED, window=window)), expected, 1e-10)
    assert_equal(results(call, SEQUENTIAL), expected, 1e-10)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("solver", [SEQUENTIAL, CONVERGED])
def test_gradcheck(cell: str, solver: Solver) -> None:
    call = arguments(Shape(cell=cell, batch=2, time=5, heads=1, channels=2, segments=True))

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        solution = solve(Arguments(cell, list(tensors), call.segment_ids), solver)
        return solution.output_BTD, solution.final_state

    assert torch.autograd.gradcheck(function, call.tensors)


@pytest.mark.parametrize("cell", CELLS)
def test_newton_agrees_with_the_loop_in_float32_at_length_2048(cell: str) -> None:
    call = arguments(Shape(cell=cell, batch=1, time=2048, heads=2, channels=8, dtype=torch.float32))
    newton, loop = results(call, Solver(method="newton")), results(call, SEQUENTIAL)
    assert_equal(newton, loop, 1e-4)
    assert float(solve(call, Solver(method="newton")).report.residual_max) < 1e-3


@pytest.mark.parametrize("cell", CELLS)
def test_packed_rows_equal_separate_documents(cell: str) -> None:
    """Outputs and gradients, to rounding; nothing crosses a border."""
    whole = arguments(Shape(cell=cell, batch=1, time=20, state=False))
    gates, *parameters = whole.tensors
    whole.segment_ids = torch.tensor([[3] * 7 + [1] * 5 + [3] * 8])
    packed = solve(whole, CONVERGED).output_BTD
    parts = []
    for start, end in ((0, 7), (7, 12), (12, 20)):
        parts.append(solve(Arguments(cell, [gates[:, start:end], *parameters], None), CONVERGED).output_BTD)
    torch.testing.assert_close(packed, torch.cat(parts, 1), rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(packed[:, 7:12].sum(), gates)
    assert grad[:, :7].abs().max() == 0
    assert grad[:, 12:].abs().max() == 0


@pytest.mark.parametrize("cell", CELLS)
def test_a_sequence_in_two_calls_equals_one(cell: str) -> None:
    call = arguments(Shape(cell=cell, time=30))
    gates, *parameters, state = call.tensors
    whole = solve(call, CONVERGED)
    first = solve(Arguments(cell, [gates[:, :11], *parameters, state], None), CONVERGED)
    second = solve(Arguments(cell, [gates[:, 11:], *parameters, first.final_state], None), CONVERGED)
    joined = torch.cat([first.output_BTD, second.output_BTD], 1)
    torch.testing.assert_close(joined, whole.output_BTD, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(joined.sum(), call.tensors)
    for ours, right in zip(grads, torch.autograd.grad(whole.output_BTD.sum(), call.tensors), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cell", CELLS)
def test_steps_equal_the_sequence(cell: str) -> None:
    call = arguments(Shape(cell=cell, time=12, dtype=torch.float32))
    gates, *parameters, state = call.tensors
    solution = solve(call, SEQUENTIAL)
    step: Callable[..., Tensor] = lstm_step if cell == "lstm" else gru_step
    for t in range(12):
        state = step(gates[:, t], *parameters, state)
        output = state[:, 1] if cell == "lstm" else state
        torch.testing.assert_close(output, solution.output_BTD[:, t], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, solution.final_state, rtol=1e-5, atol=1e-6)


def expansive(cell: str, dtype: torch.dtype = torch.float32) -> Arguments:
    """Recurrent weights as a solved Parity has them (1.6 to 2.5), where plain Newton diverges."""
    return arguments(
        Shape(cell=cell, batch=4, time=100, heads=1, channels=16, scale=6, clip=2.5, dtype=dtype)
    )


@pytest.mark.parametrize("cell", CELLS)
def test_projection_converges_where_plain_newton_diverges(cell: str) -> None:
    call = expansive(cell)
    plain = solve(call, Solver(method="newton", project=False, on_exceed="error"))
    assert float(plain.report.residual_max) > 1
    with pytest.raises(NewtonError, match=r"layers\.3: the residual is"):
        plain.report.check("layers.3")
    projected = solve(call, Solver(method="newton", max_iterations=60, limit=1e-5, window=16))
    assert float(projected.report.residual_max) <= 1e-5


@pytest.mark.parametrize("cell", CELLS)
def test_the_policy_acts_above_the_limit_only(cell: str) -> None:
    call, tame = expansive(cell, torch.float64), arguments(Shape(cell=cell))
    for policy in ("iterate", "sequential", "error"):
        solver = Solver(method="newton", iterations=2, limit=1e-3, on_exceed=policy, max_iterations=100)
        quiet = solve(tame, replace(solver, iterations=5)).report
        assert (float(quiet.acted), float(quiet.iterations)) == (0, 5)
        solution = solve(call, solver)
        report, exact = solution.report, solve(call, SEQUENTIAL).output_BTD
        assert float(report.acted) == 1
        if policy == "iterate":
            assert float(report.residual_max) <= 1e-3 and float(report.iterations) > 2
        if policy == "sequential":
            assert float(report.residual_max) == 0
            assert torch.equal(solution.output_BTD, exact)
        if policy == "error":
            assert float(report.iterations) == 2
            with pytest.raises(NewtonError, match=r"blocks\.7"):
                report.check("blocks.7")


def test_iterations_stop_at_the_tolerance_and_at_their_bound() -> None:
    call = expansive("gru")
    tame = arguments(Shape(dtype=torch.float32))
    stopped = solve(tame, Solver(method="newton", iterations=12, tolerance=1e-4)).report
    assert 1 <= float(stopped.iterations) <= 4
    assert float(stopped.residual_max) <= 1e-4
    bounded = solve(call, Solver(method="newton", iterations=1, max_iterations=2, limit=1e-6)).report
    assert (float(bounded.iterations), float(bounded.acted)) == (2, 1)
    bounded.check("a policy other than error does not raise for a finite residual")


@pytest.mark.parametrize("project", [True, False])
def test_a_residual_that_is_not_finite_is_an_error(project: bool) -> None:
    call = arguments(Shape(dtype=torch.float32))
    with torch.no_grad():
        call.tensors[0][1, 4, 0, 0, 0] = float("nan")
    for method in ("newton", "sequential", "auto"):
        report = solve(call, Solver(method=method, project=project)).report
        with pytest.raises(NewtonError, match=r"blocks\.2: the residual is not finite"):
            report.check("blocks.2")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["compiled", "torch"])
@pytest.mark.parametrize("gate", range(3))
def test_what_is_not_finite_is_seen_behind_a_reset(cell: str, dtype: torch.dtype, gate: int) -> None:
    """The final state does not know of a document that ended before it."""
    call = arguments(Shape(cell, time=9, dtype=dtype))
    call.segment_ids = torch.tensor([[0] * 5 + [1] * 4] * 2)
    with torch.no_grad():
        call.tensors[0][1, 4, 0, gate, 0] = float("nan")
    for method in ("newton", "sequential"):
        solution = solve(call, Solver(method=method))
        assert solution.final_state.isfinite().all()
        with pytest.raises(NewtonError, match=r"blocks\.2: the residual is not finite"):
            solution.report.check("blocks.2")


def test_the_jacobian_norm_is_that_of_the_steps() -> None:
    call = arguments(Shape(cell="lstm", batch=1, time=6, heads=1, channels=2))
    gates, recurrent, peephole, bias, state = (x.detach() for x in call.tensors)
    worst, h = 0.0, state
    for t in range(6):
        jacobian = torch.func.jacrev(lstm_step, argnums=4)(gates[:, t], recurrent, peephole, bias, h)
        rows = jacobian[0, :, :, 0].abs().sum((2, 3))  # over c, h and the (diagonal) channels
        worst = max(worst, float(rows.max()))
        h = lstm_step(gates[:, t], recurrent, peephole, bias, h)
    for solver in (SEQUENTIAL, CONVERGED):
        assert float(solve(call, solver).report.jacobian_norm) == pytest.approx(worst, rel=1e-5)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("method", ["sequential", "newton"])
def test_bfloat16_storage(cell: str, method: Literal["sequential", "newton"]) -> None:
    call = arguments(Shape(cell=cell, time=64, dtype=torch.bfloat16))
    wide = Arguments(cell, [x.detach().double().requires_grad_() for x in call.tensors], None)
    actual, expected = results(call, Solver(method=method)), results(wide, SEQUENTIAL)
    assert actual["output"].dtype == torch.bfloat16
    assert actual["final state"].dtype == torch.float32
    for name, right in expected.items():
        assert float((actual[name].double() - right).norm() / right.norm()) < 0.01, name


ERRORS = {
    "length 0": (lambda g, a, b, h: (g[:, :0], a, b, h), {}, "gates has a size of 0 .a sequence of length 0"),
    "gates": (lambda g, a, b, h: (g.flatten(2), a, b, h), {}, "gates must be .batch, time, heads, 3 gates"),
    "integer gates": (lambda g, a, b, h: (g.long(), a, b, h), {}, "gates must be one of float64"),
    "recurrent": (lambda g, a, b, h: (g, a[:, :2], b, h), {}, "recurrent must be .3, 6."),
    "bias": (lambda g, a, b, h: (g, a, b[:2], h), {}, "bias must be .3, 6."),
    "state of another batch": (
        lambda g, a, b, h: (g, a, b, h[:1]),
        {},
        "state must be .2, 6., for the 2 rows",
    ),
    "state outside": (
        lambda g, a, b, h: (g, a, b, h * 0 + 1.5),
        {},
        "state lies outside the cell's invariant",
    ),
    "segment shape": (
        lambda *x: x,
        {"segment_ids_BT": torch.zeros(2, 36).long()},
        "segment_ids must be .2, 37.",
    ),
    "segment dtype": (lambda *x: x, {"segment_ids_BT": torch.zeros(2, 37)}, "segment_ids must be integers"),
    "solver": (lambda *x: x, {"solver": Solver(iterations=0)}, "solver.iterations must be at least 1"),
}


@pytest.mark.parametrize(("change", "options", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_bad_input_is_refused_by_name(change: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gru(*change(*(x.detach() for x in arguments(Shape()).tensors)), **options)


def test_every_problem_of_a_solver_is_found() -> None:
    values: dict[str, Any] = {"method": "fast", "iterations": 0, "tolerance": -1, "limit": 0}
    values |= {"on_exceed": "warn", "max_iterations": -1, "window": 0}
    wrong = Solver(**values)
    fields = {"method", "iterations", "tolerance", "limit", "on_exceed", "max_iterations", "window"}
    assert {key for key, _ in wrong.problems()} == fields
    for solver in (Solver(), CONVERGED, Solver(project=False, window=64, on_exceed="error", tolerance=0.0)):
        assert solver.problems() == []
        assert Solver.unpacked(solver.packed()) == solver


def elman(inputs: Tensor, parameters: tuple[Tensor, ...], state: Tensor) -> Tensor:
    return torch.tanh(inputs + parameters[0] * state)


def oscillator(inputs: Tensor, parameters: tuple[Tensor, ...], state: Tensor) -> Tensor:
    """A cell of two numbers per channel."""
    first, second = state.unbind(-2)
    moved = torch.tanh(inputs + parameters[0] * second)
    return torch.stack([moved, torch.sin(first - parameters[1] * moved)], -2)


STEPS: dict[Structure, tuple[Step, int]] = {"diagonal": (elman, 1), "block2": (oscillator, 2)}


@pytest.mark.parametrize("structure", STEPS)
@pytest.mark.parametrize("segments", [False, True])
def test_a_cell_by_its_step_alone(structure: Structure, segments: bool) -> None:
    step, count = STEPS[structure]
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 23, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(count, 5, generator=generator, dtype=torch.float64) - 0.5
    leaves = [inputs, *(w.clone().requires_grad_() for w in weights)]
    ids = torch.arange(23).expand(2, -1) // 6 if segments else None
    found = []
    for solver in (SEQUENTIAL, CONVERGED, replace(CONVERGED, window=7)):
        solution = recurrence(
            step, inputs, tuple(leaves[1:]), structure=structure, segment_ids_BT=ids, solver=solver
        )
        loss = (solution.output_BTD * torch.arange(5)).sum() + solution.final_state.sum()
        found.append([solution.output_BTD, *torch.autograd.grad(loss, leaves)])
    problem = Problem(
        GRU, inputs, tuple(leaves[1:]), inputs.new_zeros((2, 5) if count == 1 else (2, 2, 5)), keep_of(ids)
    )
    outputs: list[Tensor] = []
    state, loss = problem.state, torch.zeros(())
    for t in range(23):
        keep = 1.0 if ids is None or t == 0 else float(ids[0, t] == ids[0, t - 1])
        state = step(inputs[:, t], problem.parameters, state * keep)
        outputs.append(state if count == 1 else state[:, 1])
        loss = loss + (outputs[-1] * torch.arange(5)).sum()
    expected = [torch.stack(outputs, 1), *torch.autograd.grad(loss + state.sum(), leaves)]
    for actual in found:
        for ours, right in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-10)
    check_structure(step, inputs[0, 0], tuple(leaves[1:]), structure=structure)


def test_a_given_jacobian_and_projection_are_used() -> None:
    inputs = torch.randn(1, 50, 4, generator=torch.Generator().manual_seed(0))
    weights = (torch.full((4,), -2.2),)

    def slope(inputs: Tensor, parameters: tuple[Tensor, ...], state: Tensor) -> Tensor:
        return parameters[0] * (1 - elman(inputs, parameters, state) ** 2)

    solver = Solver(method="newton", max_iterations=60, limit=1e-5)
    loop = recurrence(elman, inputs, weights, solver=SEQUENTIAL).output_BTD
    for jacobian in (None, slope):
        solution = recurrence(
            elman, inputs, weights, jacobian=jacobian, project=lambda h: h.clamp(-1, 1), solver=solver
        )
        assert float(solution.report.residual_max) <= 1e-5
        torch.testing.assert_close(solution.output_BTD, loop, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="state lies outside"):
        recurrence(elman, inputs, weights, torch.full((1, 4), 2.0), project=lambda h: h.clamp(-1, 1))
    with pytest.raises(ValueError, match="length 0"):
        recurrence(elman, inputs[:, :0], weights)


def oscillator_jacobian(inputs: Tensor, parameters: tuple[Tensor, ...], state: Tensor) -> Tensor:
    first, second = state.unbind(-2)
    moved = torch.tanh(inputs + parameters[0] * second)
    slope = (1 - moved * moved) * parameters[0]
    turn = torch.cos(first - parameters[1] * moved)
    rows = [torch.stack([torch.zeros_like(slope), slope], -2)]
    rows.append(torch.stack([turn, -turn * parameters[1] * slope], -2))
    return torch.stack(rows, -3)


def test_a_jacobian_that_is_not_the_steps_is_refused() -> None:
    inputs, weights = torch.zeros(4), (torch.rand(4), torch.rand(4))
    check_structure(oscillator, inputs, weights, structure="block2", jacobian=oscillator_jacobian)
    with pytest.raises(ValueError, match="jacobian is not the derivative of step"):
        check_structure(
            oscillator,
            inputs,
            weights,
            structure="block2",
            jacobian=lambda *point: oscillator_jacobian(*point).transpose(-3, -2),
        )
    with pytest.raises(ValueError, match=r"jacobian must return \(4,\) here"):
        check_structure(elman, inputs, weights[:1], jacobian=lambda *point: torch.ones(1))
    with pytest.raises(ValueError, match="parameters must be a tuple"):
        recurrence(elman, torch.zeros(1, 3, 4), weights[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("structure", STEPS)
def test_a_step_that_mixes_channels_is_refused(structure: Structure) -> None:
    def mixing(inputs: Tensor, parameters: tuple[Tensor, ...], state: Tensor) -> Tensor:
        return torch.tanh(inputs + state @ parameters[0])

    with pytest.raises(ValueError, match=rf"mixes channels though it is declared '{structure}'"):
        check_structure(mixing, torch.zeros(4), (torch.rand(4, 4),), structure=structure)


@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_and_compile(cell: str) -> None:
    call = arguments(Shape(cell=cell, time=6, segments=True, dtype=torch.float32))
    gates, recurrent, *peephole, bias, state = call.tensors
    peephole_2D = peephole[0] if peephole else None
    given = (gates, recurrent, peephole_2D, bias, state, call.segment_ids, Solver().packed())
    torch.library.opcheck(torch.ops.triptych.newton_rnn.default, given)

    def loss(*tensors: Tensor) -> Tensor:
        solution = solve(Arguments(cell, list(tensors), call.segment_ids))
        return solution.output_BTD.square().sum() + solution.final_state.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*call.tensors), call.tensors)
    for ours, right in zip(torch.autograd.grad(compiled(*call.tensors), call.tensors), expected, strict=True):
        torch.testing.assert_close(ours, right)
