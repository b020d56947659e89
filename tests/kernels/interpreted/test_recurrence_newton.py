"""The recurrence kernels in Triton's interpreter, against the torch loop in float64.

Shapes are tiny: the interpreter's scan is a loop over elements.

Shape suffixes: B batch, T time, H input heads, G gates, N channels of a head, D = H N channels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.newton_rnn import NewtonError, Solver, tiles
from kernels.newton_rnn.tiles import Lanes, Pair, Tile
from tests.kernels.newton_problems import Arguments, Shape, arguments, results, solve

CELLS = ("gru", "lstm")
NEWTON = Solver(method="newton", iterations=8, tolerance=1e-7)
SEQUENTIAL = Solver(method="sequential")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Pair(Tile(8, 4, 4), Tile(8, 4, 4))
    monkeypatch.setattr(tiles, "NEWTON", {False: small, True: small})
    monkeypatch.setattr(tiles, "ADJOINT", {False: small, True: small})
    monkeypatch.setattr(tiles, "SEQUENTIAL", Lanes(4, 4))
    monkeypatch.setattr(tiles, "SEQUENTIAL_ADJOINT", Lanes(4, 4))


# Forward and adjoint do not know of each other: each form of one meets one form of the other.
FORMS = {"sequential": (Solver(method="sequential"), False), "newton": (NEWTON, True)}


@pytest.fixture(params=FORMS)
def solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Solver:
    """Both forms in time order, and both forms parallel in time."""
    chosen, parallel = FORMS[request.param]
    monkeypatch.setattr(tiles, "parallel_adjoint_is_faster", lambda *shape: parallel)
    return chosen


def in_double(call: Arguments) -> Arguments:
    """The same call in fp64, which runs as the torch loop."""
    tensors = [x.detach().double().requires_grad_() for x in call.tensors]
    return Arguments(call.cell, tensors, call.segment_ids)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, right in expected.items():
        scale = right.abs().max().clamp(min=1.0)
        error = float((actual[name].double() - right).abs().max() / scale)
        assert error <= tolerance, f"{name} differs by {error:.1e}"


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("segments", [False, True])
def test_outputs_and_gradients(cell: str, segments: bool, solver: Solver) -> None:
    call = arguments(Shape(cell, time=13, heads=2, channels=3, segments=segments, dtype=torch.float32))
    assert_close(results(call, solver), results(in_double(call), SEQUENTIAL), 1e-5)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("time", [1, 7, 8, 9])
def test_lengths_around_a_tile(cell: str, time: int, solver: Solver) -> None:
    call = arguments(Shape(cell, batch=1, time=time, heads=1, channels=4, dtype=torch.float32))
    assert_close(results(call, solver), results(in_double(call), SEQUENTIAL), 1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_storage(cell: str, solver: Solver) -> None:
    call = arguments(Shape(cell, time=11, heads=1, channels=4, dtype=torch.bfloat16))
    actual, expected = results(call, solver), results(in_double(call), SEQUENTIAL)
    assert actual["output"].dtype == torch.bfloat16
    assert actual["final state"].dtype == torch.float32
    for name, right in expected.items():
        assert float((actual[name].double() - right).norm() / right.norm()) < 0.01, name


@pytest.mark.parametrize("cell", CELLS)
def test_the_report_equals_that_of_the_torch_form(cell: str) -> None:
    """On one window, iteration by iteration; fp64 runs in torch."""
    call = arguments(Shape(cell, time=8, heads=1, channels=4, dtype=torch.float32))
    for iterations in (1, 2):
        solver = Solver(method="newton", iterations=iterations, on_exceed="error")
        ours, right = solve(call, solver).report, solve(in_double(call), solver).report
        for name in ("residual_max", "residual_mean", "iterations", "jacobian_norm", "acted"):
            assert float(getattr(ours, name)) == pytest.approx(
                float(getattr(right, name)), rel=1e-3, abs=1e-6
            )
    sequential = solve(call, SEQUENTIAL).report
    right = solve(in_double(call), SEQUENTIAL).report
    assert float(sequential.jacobian_norm) == pytest.approx(float(right.jacobian_norm), rel=1e-5)
    assert float(sequential.residual_max) == float(sequential.iterations) == 0


def expansive(cell: str) -> Arguments:
    shape = Shape(cell, batch=1, time=16, heads=1, channels=4, scale=6, clip=2.5, dtype=torch.float32)
    return arguments(shape)


@pytest.mark.parametrize("cell", CELLS)
def test_the_policies_act_without_the_host(cell: str) -> None:
    call = expansive(cell)
    right = solve(in_double(call), SEQUENTIAL).output_BTD
    options: dict[str, Any] = {"method": "newton", "iterations": 1, "limit": 1e-4, "max_iterations": 16}
    iterated = solve(call, Solver(on_exceed="iterate", **options))
    assert float(iterated.report.residual_max) <= 1e-4
    assert 1 < float(iterated.report.iterations) <= 16
    assert float(iterated.report.acted) == 1
    torch.testing.assert_close(iterated.output_BTD.double(), right, rtol=0, atol=1e-2)
    fallen_back = solve(call, Solver(on_exceed="sequential", **options))
    assert [float(fallen_back.report.residual_max), float(fallen_back.report.acted)] == [0, 1]
    torch.testing.assert_close(fallen_back.output_BTD.double(), right, rtol=0, atol=1e-4)
    left = solve(call, Solver(on_exceed="error", **options))
    assert float(left.report.iterations) == 1
    with pytest.raises(NewtonError, match=r"blocks\.5: the residual is"):
        left.report.check("blocks.5")
    tame = arguments(Shape(cell, batch=1, time=8, heads=1, channels=4, dtype=torch.float32))
    quiet = solve(tame, Solver(method="newton", iterations=4, on_exceed="sequential"))
    assert float(quiet.report.acted) == 0
    assert 0 < float(quiet.report.residual_max) < 1e-4


@pytest.mark.parametrize("cell", CELLS)
def test_overflow_is_seen_and_projection_prevents_it(cell: str) -> None:
    call = expansive(cell)
    with torch.no_grad():
        call.tensors[1].mul_(1e25)  # the recurrent weights: a plain iteration overflows
    projected = solve(call, Solver(method="newton", on_exceed="error"))
    assert float(projected.report.residual_max) <= 2
    assert float(projected.output_BTD.detach().abs().max()) <= 1
    with torch.no_grad():
        call.tensors[0][0, 3] = float("nan")
    for project in (True, False):
        with pytest.raises(NewtonError, match="not finite"):
            solve(call, Solver(method="newton", project=project)).report.check("blocks.0")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("gate", range(3))
def test_what_is_not_finite_is_seen_behind_a_reset(cell: str, gate: int, solver: Solver) -> None:
    call = arguments(Shape(cell, batch=1, time=9, heads=1, channels=4, dtype=torch.float32))
    call.segment_ids = torch.tensor([[0] * 5 + [1] * 4])
    with torch.no_grad():
        call.tensors[0][0, 4, 0, gate, 0] = float("nan")
    solution = solve(call, solver)
    assert solution.final_state.isfinite().all()
    with pytest.raises(NewtonError, match="not finite"):
        solution.report.check("blocks.0")


def test_a_window_bounds_the_tile() -> None:
    pair = Pair(Tile(128, 16, 4), Tile(256, 8, 8))
    assert tiles.tile_of(pair, 64, 4096) == Tile(128, 16, 4)
    assert tiles.tile_of(pair, 1, 1024) == Tile(256, 8, 8)
    assert tiles.tile_of(pair, 1, 6, window=100) == Tile(64, 8, 8)
    assert tiles.tile_of(pair, 1, 3, window=32) == Tile(32, 4, 8)


@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_through_the_kernels(cell: str) -> None:
    call = arguments(Shape(cell, batch=1, time=3, heads=1, channels=2, segments=True, dtype=torch.float32))
    gates, recurrent, *peephole, bias, state = call.tensors
    settings = Solver(method="newton", iterations=1).packed()
    given = (gates, recurrent, peephole[0] if peephole else None, bias, state, call.segment_ids, settings)
    torch.library.opcheck(torch.ops.triptych.newton_rnn.default, given)
