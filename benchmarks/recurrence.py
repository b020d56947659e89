"""The nonlinear recurrences: every form beside its rivals, the memory's limit, and where the forms cross.

    python -m benchmarks.recurrence --out recurrence.json            on a GPU: torch and triton are all it needs
    python -m benchmarks.recurrence --device cpu --quick             exercises the whole program in a minute
    python -m benchmarks.recurrence --offline                        registers and spills on Hopper, without a GPU

Correctness first: each of our forms against the loop over time in float64, with resets, output, final state and
every gradient; nothing is timed if one is wrong. Then forward, forward + backward and peak memory of all
contestants on the same gates, the time of moving a call's inputs and outputs once at measured copy bandwidth,
and a map of Newton against the walk in time over rows, channels and length.

Contestants: `torch loop` (autograd through a loop over time), `compiled loop` (its step under torch.compile),
`newton`, `sequential`; and as whole layers with their input projection `ours` and `pararnn-torch`, if that is
installed.

Shape suffixes: B batch, T time, H input heads, G gates, N channels of a head, D = H N channels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import save
from kernels.devices import runs_triton
from kernels.newton_rnn import Solver, cpu, forms, gru, gru_step, lstm, lstm_step, tiles
from kernels.newton_rnn.torch_forms import Call, torch_backward, torch_forward

Step = Callable[..., Tensor]
HEADS = 4
NEWTON, SEQUENTIAL = Solver(method="newton"), Solver(method="sequential")


@dataclass(frozen=True)
class Case:
    """One shape. `loops`: whether the loops over time, which take seconds, run too."""

    cell: str
    batch: int
    width: int
    time: int
    dtype: torch.dtype = torch.bfloat16
    loops: bool = False
    heads: int = HEADS

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.cell} B{self.batch} D{self.width} T{self.time} {dtype}"


@dataclass
class Arguments:
    """Gates, weights (recurrent, the LSTM's peephole, bias), state; and segment ids (B, T) or None."""

    tensors: list[Tensor]
    segment_ids: Tensor | None = None


def arguments(case: Case, device: torch.device, *, segments: bool = False) -> Arguments:
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(sizes, generator=generator)

    gates = torch.randn(
        case.batch, case.time, case.heads, 3, case.width // case.heads, device=device, dtype=case.dtype
    )
    weights = [normal(3, case.width, scale=0.3), normal(3, case.width, scale=0.1)]
    if case.cell == "lstm":
        weights.insert(1, normal(2, case.width, scale=0.3))
    weights[:-1] = [weight.clamp(-0.5, 0.5) for weight in weights[:-1]]
    shape = (case.batch, case.width) if case.cell == "gru" else (case.batch, 2, case.width)
    state = (torch.rand(shape, generator=generator) - 0.5).to(device)
    ids = None
    if segments:
        ids = (torch.rand(case.batch, case.time, generator=generator) < 0.01).long().cumsum(1).to(device)
    tensors = [gates, *(weight.to(device) for weight in weights), state]
    return Arguments([tensor.requires_grad_() for tensor in tensors], ids)


def loop(case: Case, given: Arguments, step: Step) -> list[Tensor]:
    """Output (B, T, D) and final state, by a loop over time."""
    gates, *weights, state = given.tensors
    outputs = []
    for t in range(case.time):
        if given.segment_ids is not None and t:
            kept = given.segment_ids[:, t] == given.segment_ids[:, t - 1]
            state = state * kept.reshape((-1,) + (1,) * (state.dim() - 1))
        state = step(gates[:, t], *weights, state)
        outputs.append(state if case.cell == "gru" else state[:, 1])
    return [torch.stack(outputs, 1).to(gates.dtype), state]


def ours(case: Case, given: Arguments, solver: Solver) -> list[Tensor]:
    op = gru if case.cell == "gru" else lstm
    solution = op(*given.tensors, segment_ids_BT=given.segment_ids, solver=solver)
    return [solution.output_BTD, solution.final_state]


def with_gradients(solve: Callable[[], list[Tensor]], tensors: list[Tensor]) -> list[Tensor]:
    """Output, final state and the gradients of all tensors, for fixed cotangents of both."""
    output, final = solve()
    # A fixed cotangent, so that forms can be compared.
    weight = torch.linspace(-1, 1, output.shape[-1], device=output.device)
    loss = (output.to(final.dtype) * weight).sum() + (final * weight).sum()
    return [output.detach(), final.detach(), *torch.autograd.grad(loss, tensors)]


def check(device: torch.device, time_steps: int) -> dict[str, float]:
    """The greatest error of each form against the loop in float64; SystemExit if one is too large."""
    errors = {}
    for cell in ("gru", "lstm"):
        for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
            case = Case(cell, 2, 96, time_steps, dtype, heads=2)
            given = arguments(case, device, segments=True)
            wide = Arguments([x.detach().double().requires_grad_() for x in given.tensors], given.segment_ids)
            step = gru_step if cell == "gru" else lstm_step
            right = with_gradients(lambda c=case, w=wide, s=step: loop(c, w, s), wide.tensors)  # type: ignore[misc]
            for form in ("newton", "sequential"):
                solver = replace(NEWTON, method=form)
                with _adjoint(parallel=form == "newton"):
                    found = with_gradients(
                        lambda c=case, g=given, s=solver: ours(c, g, s),  # type: ignore[misc]
                        given.tensors,
                    )
                error = max(
                    float((a.double() - b).norm() / b.norm()) for a, b in zip(found, right, strict=True)
                )
                errors[f"{cell} {form} {str(dtype).removeprefix('torch.')}"] = error
                if not error <= limit:
                    raise SystemExit(f"{cell} {form} {dtype} is wrong by {error:.1e}; nothing is timed")
    return errors


class _adjoint:
    """Runs the adjoint parallel in time, or not, whatever the shape."""

    def __init__(self, *, parallel: bool) -> None:
        self.parallel = parallel

    def __enter__(self) -> None:
        self.before = tiles.parallel_adjoint_is_faster
        tiles.parallel_adjoint_is_faster = lambda rows, width, time: self.parallel

    def __exit__(self, *_: object) -> None:
        tiles.parallel_adjoint_is_faster = self.before


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int, warm: int = 2) -> float:
    """The median of `repeats` runs after `warm` others."""
    times = []
    for turn in range(repeats + warm):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            elapsed = begin.elapsed_time(end)
        else:
            start = time.perf_counter()
            run()
            elapsed = 1000 * (time.perf_counter() - start)
        if turn >= warm:
            times.append(elapsed)
    return statistics.median(times)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Memory that a run takes beyond what was held before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy too large for any cache."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**24, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / (milliseconds(lambda: target.copy_(source), device, 10) / 1000)


def moved_bytes(case: Case) -> int:
    """Gates in, output and the LSTM's cell states out."""
    numbers = 4 if case.cell == "gru" else 5
    return case.batch * case.time * case.width * numbers * torch.empty((), dtype=case.dtype).element_size()


def contestants(case: Case, given: Arguments) -> dict[str, Callable[[], list[Tensor]]]:
    found: dict[str, Callable[[], list[Tensor]]] = {
        "newton": lambda: ours(case, given, NEWTON),
        "sequential": lambda: ours(case, given, SEQUENTIAL),
    }
    if case.loops:
        step = gru_step if case.cell == "gru" else lstm_step
        torch.compiler.reset()  # past its limit of recompilations it would quietly run eagerly
        compiled = torch.compile(step)
        found["torch loop"] = lambda: loop(case, given, step)
        found["compiled loop"] = lambda: loop(case, given, compiled)
    return found


def measure(case: Case, device: torch.device, repeats: int, bandwidth: float) -> dict[str, Any]:
    given = arguments(case, device)
    rows = {}
    for name, solve in contestants(case, given).items():
        turns, warm = (3, 1) if "loop" in name else (repeats, 2)

        def forward(solve: Callable[[], list[Tensor]] = solve) -> list[Tensor]:
            with torch.no_grad():
                return solve()

        def both(solve: Callable[[], list[Tensor]] = solve) -> list[Tensor]:
            return with_gradients(solve, given.tensors)

        rows[name] = {
            "forward_ms": milliseconds(forward, device, turns, warm),
            "forward_backward_ms": milliseconds(both, device, turns, warm),
            "peak_bytes": peak_bytes(both, device),
        }
    difference = (ours(case, given, NEWTON)[0] - ours(case, given, SEQUENTIAL)[0]).abs().max()
    settings = {**asdict(case), "dtype": str(case.dtype)}
    return {
        "case": settings,
        "name": case.name,
        "contestants": rows,
        "newton_minus_sequential": float(difference.detach()),
        "roofline_ms": 1000 * moved_bytes(case) / bandwidth,
    }


def layers(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Whole layers with a dense input projection: ours, and pararnn-torch's where it is installed."""
    width = case.width
    x = torch.randn(case.batch, case.time, width, device=device, dtype=case.dtype, requires_grad=True)
    dense = replace(case, heads=1)
    given = arguments(replace(dense, time=1), device)
    weight = torch.randn(width, 3 * width, device=device, dtype=case.dtype) * width**-0.5
    leaves = [x, weight.requires_grad_(), *given.tensors[1:-1]]

    def our_layer() -> Tensor:
        gates = (x @ leaves[1]).unflatten(-1, (1, 3, width))
        return ours(dense, Arguments([gates, *leaves[2:], given.tensors[-1]]), Solver())[0]

    runs: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {"ours": (our_layer, leaves)}
    failures = {}
    try:
        module = _rival(case, device)
        runs["pararnn-torch"] = (lambda: module(x), [x, *module.parameters()])
    except ModuleNotFoundError as error:
        failures["pararnn-torch"] = "not installed" if error.name == "pararnn" else str(error)
    except Exception as error:  # another's package: its failure is a result
        failures["pararnn-torch"] = f"{type(error).__name__}: {error}"
    found: dict[str, Any] = {"name": case.name, "contestants": {}, "failures": failures}
    for name, (run, tensors) in runs.items():

        def both(run: Callable[[], Tensor] = run, tensors: list[Tensor] = tensors) -> object:
            return torch.autograd.grad(run().float().sum(), tensors, allow_unused=True)

        try:
            found["contestants"][name] = {
                "forward_backward_ms": milliseconds(both, device, repeats),
                "peak_bytes": peak_bytes(both, device),
            }
        except Exception as error:
            if name == "ours":
                raise
            failures[name] = f"{type(error).__name__}: {error}"
    return found


def _rival(case: Case, device: torch.device) -> Any:
    """pararnn-torch's layer of the same width, three iterations, in training mode."""
    pararnn = import_module("pararnn")  # is not among this project's dependencies
    cell = pararnn.ParaGRU if case.cell == "gru" else pararnn.ParaLSTM
    layer = pararnn.ParaRNN(
        cell(case.width, case.width, device=device), config=pararnn.NewtonConfig(max_iters=3)
    )
    return layer.to(device=device, dtype=case.dtype).train()


def crossover(shapes: list[Case], device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Newton against the walk in time, forward and adjoint, kernels alone."""
    table = []
    for case in shapes:
        call = _call(case, device)
        newton, sequential, adjoints = _forms(call)
        result = sequential(call)
        grad, grad_final = torch.ones_like(result.output_BTD), torch.zeros_like(call.state)
        given = (call, result.output_BTD, result.cells_BTD, grad, grad_final)
        row: dict[str, Any] = {
            "name": case.name,
            "lanes": case.batch * case.width,
            "time": case.time,
            "newton_ms": milliseconds(lambda c=call, f=newton: f(c), device, repeats),  # type: ignore[misc]
            "sequential_ms": milliseconds(lambda c=call, f=sequential: f(c), device, repeats),  # type: ignore[misc]
        }
        for name, adjoint in adjoints.items():
            row[f"{name}_adjoint_ms"] = milliseconds(
                lambda g=given, f=adjoint: f(*g),  # type: ignore[misc]
                device,
                repeats,
            )
        if device.type == "cuda":  # on a CPU nothing is estimated: it always walks
            faster = tiles.newton_is_faster(case.batch, case.width, case.time)
            row["estimated"] = "newton" if faster else "walk"
        table.append(row)
    return table


def _forms(call: Call) -> tuple[Callable[..., Any], Callable[..., Any], dict[str, Callable[..., Any]]]:
    """Newton's form, the form in time order, and the adjoints of this device."""
    if runs_triton(call.gates_BTHGN):
        from kernels.newton_rnn import triton_launch

        adjoints = {
            "parallel": triton_launch.parallel_backward,
            "sequential": triton_launch.sequential_backward,
        }
        return triton_launch.newton_forward, triton_launch.sequential_forward, adjoints
    walk = {"parallel": torch_backward, "sequential": forms.backward}
    return lambda call: torch_forward(call, newton=True), forms.forward, walk


def _call(case: Case, device: torch.device) -> Call:
    gates, *weights, state = (tensor.detach() for tensor in arguments(case, device).tensors)
    return Call(gates, tuple(weights), state, None, replace(SEQUENTIAL, on_exceed="error"))


def shapes_to_cross(*, quick: bool) -> list[Case]:
    if quick:
        return [Case(cell, 1, 64, 256, torch.float32) for cell in ("gru", "lstm")]
    return [
        Case(cell, batch, width, time)
        for cell in ("gru", "lstm")
        for batch in (1, 2, 4, 8, 16, 32)
        for width in (1024, 2048, 4096)
        for time in (512, 2048, 8192, 32768, 65536)
        if batch * width * time <= 2**29
    ]


def cases(*, quick: bool, device: torch.device) -> list[Case]:
    if quick:
        return [Case(cell, 2, 32, 64, torch.float32, loops=True) for cell in ("gru", "lstm")]
    if device.type == "cpu":
        shapes = ((12, 128, 64), (64, 64, 100), (1, 64, 2048), (8, 256, 512))
        return [
            Case(cell, batch, width, time, torch.float32, loops=time <= 100)
            for cell in ("gru", "lstm")
            for batch, width, time in shapes
        ]
    return [
        case
        for cell in ("gru", "lstm")
        for case in (
            Case(cell, 8, 2048, 512, torch.float32, loops=True),
            Case(cell, 8, 2048, 2048),
            Case(cell, 1, 2048, 65536),
            Case(cell, 8, 2048, 2048, torch.float32),
        )
    ]


def targets(results: list[dict[str, Any]], whole_layers: list[dict[str, Any]]) -> dict[str, float]:
    """The ratios that were asked for, at the shapes they were asked for."""
    found = {}
    for result in results:
        rows, name, case = result["contestants"], result["name"], result["case"]
        newton, walk = rows["newton"]["forward_ms"], rows["sequential"]["forward_ms"]
        if (case["batch"], case["time"]) == (8, 2048):
            found[f"{name}: best forward / roofline (<= 3)"] = min(newton, walk) / result["roofline_ms"]
        if case["time"] == 65536:
            found[f"{name}: sequential / newton (>= 3)"] = walk / newton
        if "torch loop" in rows:
            wanted = 447 if case["cell"] == "gru" else 665
            speed = rows["torch loop"]["forward_ms"] / min(newton, walk)
            found[f"{name}: torch loop / best forward (> {wanted})"] = speed
    for result in whole_layers:
        rows = result["contestants"]
        if "pararnn-torch" in rows:
            time_ratio = rows["pararnn-torch"]["forward_backward_ms"] / rows["ours"]["forward_backward_ms"]
            memory = rows["ours"]["peak_bytes"] / rows["pararnn-torch"]["peak_bytes"]
            found[f"{result['name']}: pararnn-torch / ours, both passes (>= 2)"] = time_ratio
            found[f"{result['name']}: ours / pararnn-torch, peak memory (<= 0.5)"] = memory
    return found


def print_results(results: list[dict[str, Any]]) -> None:
    for result in results:
        print(f"\n{result['name']}  (inputs and outputs moved once: {result['roofline_ms']:.3f} ms)")
        print(f"  {'':<16}{'forward ms':>12}{'both ms':>12}{'peak MiB':>10}")
        for name, row in result["contestants"].items():
            peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
            print(f"  {name:<16}{row['forward_ms']:12.3f}{row['forward_backward_ms']:12.3f}{peak:>10}")


def print_layers(results: list[dict[str, Any]]) -> None:
    for result in results:
        print(f"\nwhole layer, {result['name']}")
        for name, row in result["contestants"].items():
            peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f} MiB"
            print(f"  {name:<16}{row['forward_backward_ms']:12.3f} ms both passes, {peak}")
        for name, reason in result["failures"].items():
            print(f"  {name:<16}{reason}")


def print_crossover(table: list[dict[str, Any]]) -> None:
    adjoints = ("parallel_adjoint_ms", "sequential_adjoint_ms")
    print(f"\n{'':<34}{'newton':>10}{'walk':>10}{'adjoints: parallel':>20}{'walk':>10}  estimated")
    for row in table:
        first, second = (row[name] for name in adjoints)
        print(
            f"{row['name']:<34}{row['newton_ms']:10.3f}{row['sequential_ms']:10.3f}{first:20.3f}{second:10.3f}"
            f"  {row.get('estimated', '-')}"
        )
    right = [
        (row["newton_ms"] < row["sequential_ms"]) == (row["estimated"] == "newton")
        for row in table
        if "estimated" in row
    ]
    if right:
        print(f"the estimate in kernels/newton_rnn/tiles.py is right for {sum(right)} of {len(right)} shapes")


def offline() -> dict[str, Any]:
    """What the compiler makes of every kernel that ships, for sm_90a."""
    from kernels.newton_rnn.variants import variants
    from kernels.offline import complaints

    table = {}
    for half in (True, False):
        for variant in variants(half=half):
            resources = variant.compile()
            name = f"{variant.name} {'bf16' if half else 'fp32'}"
            table[name] = asdict(resources) | {"complaints": complaints(resources, matrix_products=False)}
            print(f"{name:<36}{resources}", flush=True)
    return {"kernels": table}


def run(device: torch.device, *, quick: bool, repeats: int) -> dict[str, Any]:
    if device.type == "cpu":
        print("CPU form:", "compiled C" if cpu.library() is not None else "torch loop (no compiler)")
    errors = check(device, 128 if quick else 2048)
    for name, error in errors.items():
        print(f"right: {name:<28}relative error {error:.0e}")
    bandwidth = copy_bandwidth(device)
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    results = [measure(case, device, repeats, bandwidth) for case in cases(quick=quick, device=device)]
    print_results(results)
    layer_case = Case("gru", 2, 32, 64, torch.float32) if device.type == "cpu" else Case("gru", 8, 2048, 2048)
    both = [layers(replace(layer_case, cell=cell), device, repeats) for cell in ("gru", "lstm")]
    print_layers(both)
    table = crossover(shapes_to_cross(quick=quick or device.type == "cpu"), device, min(repeats, 5))
    print_crossover(table)
    ratios = targets(results, both) if device.type == "cuda" else {}
    print()
    for name, ratio in ratios.items():
        print(f"{name:<78}{ratio:10.2f}")
    return {
        "errors": errors,
        "copy_bytes_per_second": bandwidth,
        "results": results,
        "layers": both,
        "crossover": table,
        "ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that the program runs")
    parser.add_argument(
        "--offline", action="store_true", help="report what the compiler makes of the kernels"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()
    if options.offline:
        save(offline(), options.out)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "there is no CUDA device here; --device cpu measures the CPU's forms, --offline the kernels"
        )
    save(run(torch.device(options.device), quick=options.quick, repeats=options.repeats), options.out)


if __name__ == "__main__":
    main()
