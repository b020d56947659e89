"""The compiled CPU form: against the torch loop, threads, how it is built, and what it leaves alone.

Shape suffixes: B batch, T time, H input heads, G gates, N channels of a head, D = H N channels.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.newton_rnn import Solver, cpu, forms
from tests.harness import run_ranks
from tests.kernels.newton_problems import Shape, arguments, results, solve

CELLS = ("gru", "lstm")
SEQUENTIAL = Solver(method="sequential")


def by_the_torch_loop(shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "_compiled", lambda call: None)
        return results(arguments(shape, seed), SEQUENTIAL)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, right in expected.items():
        scale = right.abs().max().clamp(min=1.0)
        error = float((actual[name].double() - right.double()).abs().max() / scale)
        assert error <= tolerance, f"{name} differs by {error:.1e}"


def test_the_library_is_built_here() -> None:
    assert cpu.library() is not None


@settings(max_examples=40, deadline=None)
@given(
    cell=st.sampled_from(CELLS),
    batch=st.integers(1, 5),
    time=st.integers(1, 70),
    heads=st.integers(1, 3),
    channels=st.integers(1, 40),
    segments=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_equals_the_torch_loop(
    cell: str, batch: int, time: int, heads: int, channels: int, segments: bool, seed: int
) -> None:
    shape = Shape(cell, batch, time, heads, channels, segments=segments, dtype=torch.float32)
    assert_close(results(arguments(shape, seed), SEQUENTIAL), by_the_torch_loop(shape, seed), 1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_wide_heads_and_many_rows(cell: str) -> None:
    """Several tasks along every axis: channels of a head, heads, rows."""
    shape = Shape(cell, batch=5, time=9, heads=2, channels=517, segments=True, dtype=torch.float32)
    assert_close(results(arguments(shape), SEQUENTIAL), by_the_torch_loop(shape), 1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_float64_agreement_at_length_2048(cell: str) -> None:
    """fp32 does not drift over a long sequence; the definition is the loop in fp64."""
    shape = Shape(cell, batch=2, time=2048, heads=2, channels=8, dtype=torch.float32)
    call = arguments(shape)
    wide = arguments(shape)
    wide.tensors = [x.detach().double().requires_grad_() for x in wide.tensors]
    assert_close(results(call, SEQUENTIAL), results(wide, SEQUENTIAL), 1e-4)


@pytest.mark.parametrize("cell", CELLS)
def test_any_number_of_threads_gives_the_same_bits(cell: str) -> None:
    call = arguments(Shape(cell, batch=7, time=20, heads=3, channels=70, dtype=torch.float32))
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(call, SEQUENTIAL))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], right) for name, right in found[0].items())


def _output_in_a_rank() -> float:
    return float(solve(arguments(Shape(dtype=torch.float32)), SEQUENTIAL).output_BTD.sum())


def test_forked_ranks_compute_after_threads_have_run() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    here = float(
        solve(arguments(Shape(batch=64, channels=64, dtype=torch.float32)), SEQUENTIAL).output_BTD.sum()
    )
    assert here == here
    torch.set_num_threads(before)
    assert run_ranks(2, _output_in_a_rank) == [_output_in_a_rank()] * 2


@pytest.mark.parametrize("size", [1e-6, 1.0, 30.0, 1e4, 3e38])
def test_extreme_inputs_saturate_as_in_torch(size: float) -> None:
    for cell in CELLS:
        call = arguments(Shape(cell, time=5, dtype=torch.float32))
        with torch.no_grad():
            call.tensors[0].mul_(size)
        compiled = solve(call, SEQUENTIAL)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forms, "_compiled", lambda call: None)
            loop = solve(call, SEQUENTIAL)
        torch.testing.assert_close(compiled.output_BTD, loop.output_BTD, rtol=0, atol=5e-6)


def test_what_is_not_a_number_stays_visible() -> None:
    call = arguments(Shape(dtype=torch.float32))
    with torch.no_grad():
        call.tensors[0][1, 4, 0, 0, 0] = float("nan")
    output = solve(call, SEQUENTIAL).output_BTD
    assert output[1, 4:, 0].isnan().all()
    assert output[0].isfinite().all()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_torchs_default_dtype_does_not_matter(cell: str, default: torch.dtype) -> None:
    """C writes fp32: a buffer of another dtype would be too short, or misread."""
    shape = Shape(cell, dtype=torch.float32)
    expected = results(arguments(shape), SEQUENTIAL)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        actual = results(arguments(shape), SEQUENTIAL)
    finally:
        torch.set_default_dtype(before)
    for name, right in expected.items():
        assert torch.equal(actual[name], right), name


def test_without_a_compiler_the_torch_loop_runs_after_one_warning() -> None:
    code = (
        "import warnings, torch\n"
        "from kernels.newton_rnn import gru\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2):\n"
        "        out = gru(torch.ones(1, 3, 1, 3, 2), torch.ones(3, 2), torch.zeros(3, 2)).output_BTD\n"
        "print(len(caught), caught[0].message, out.sum().item())\n"
    )
    environment = {**os.environ, "PATH": "/nonexistent", "CC": "no-such-compiler"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 nonlinear recurrences run in a torch loop"), done.stdout
    assert "no C compiler" in done.stdout


def test_many_processes_build_at_once(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    assert compiler is not None
    paths = run_ranks(4, cpu.build, compiler, (*cpu.FLAGS, "-O0"), tmp_path)
    assert len(set(paths)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [Path(paths[0]).name]
    assert cpu.build(compiler, (*cpu.FLAGS, "-O1"), tmp_path) != paths[0]


def test_denormal_numbers_survive_the_library() -> None:
    code = (
        "import torch\n"
        "from kernels.newton_rnn import cpu\n"
        "assert cpu.library() is not None\n"
        "print((torch.tensor([1e-39]) * 0.5 > 0).item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr


def test_without_triton_everything_imports_and_runs() -> None:
    """The CPU builds of torch come without it."""
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch\n"
        "import kernels.newton_rnn.variants, kernels.linear_recurrence\n"
        "from kernels.newton_rnn import Solver, gru\n"
        "for method in ('auto', 'newton'):\n"
        "    print(gru(torch.ones(1, 3, 1, 3, 2), torch.zeros(3, 2), torch.zeros(3, 2),\n"
        "              solver=Solver(method=method)).output_BTD.shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("torch.Size([1, 3, 2])") == 2, done.stderr
