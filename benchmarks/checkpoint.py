"""Measure saving and loading a checkpoint beside reading and writing the same bytes, in one run.

    python -m benchmarks.checkpoint --parameters 100e6 --ranks 2 --out checkpoint.json

Each rank holds an equal flat part of every parameter, as under ZeRO-1, of a Transformer-like list of matrices
and vectors: weights and two moments in float32, 12 bytes per parameter. Times are those of the slowest rank;
the median of the rounds is reported. Reading is measured from the disk: the files' pages are dropped from the
page cache before each read (posix_fadvise), and once more from the cache.

An asynchronous save copies the tensors while the loop computes the next gradients, and the optimizer's step
waits for the copy. What stands in for that computation is a forward and a backward pass through all those
matrices, of --tokens tokens, on every rank. "Blocked" is the time in `save` before it plus the time in
`wait_staged` after it. The time of the computation is reported too, alone and beside the copying and writing,
for they share the machine's cores and memory. "Blocked if the update came at once" is the same sum with no
computation in between. Nothing computes while the other figures are taken.

The first of two writes in a row and the second differ by more than what is measured on some disks, so raw
write and synchronous save take turns at being first, and each begins with nothing left to write back.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.multiprocessing.spawn import spawn

from pretrain.checkpoint import CheckpointStore, Fragment, Placement, TrainingState
from pretrain.json_text import to_json

BLOCK_BYTES = 4 << 20
WIDTH = 768
MOVING = ("raw", "synchronous save", "load")  # times in which all bytes are written or read
LAYER_SHAPES = ((4, 1), (8, 1), (1,))  # multiples of the width: attention, feed-forward, a norm

Timings = dict[str, list[float]]


def parameter_shapes(parameters: int, width: int = WIDTH) -> dict[str, tuple[int, ...]]:
    """Names and shapes of about `parameters` elements in layers of matrices and vectors."""
    shapes: dict[str, tuple[int, ...]] = {}
    total = 0
    while total < parameters:
        layer = len(shapes) // len(LAYER_SHAPES)
        for part, units in enumerate(LAYER_SHAPES):
            shape = tuple(unit * width for unit in units)
            shapes[f"layers.{layer}.part{part}"] = shape
            total += math.prod(shape)
    return shapes


def make_state(parameters: int, rank: int, ranks: int) -> TrainingState:
    """This rank's part of each parameter, filled with random numbers."""
    fragments = []
    generator = torch.Generator().manual_seed(rank)
    for name, shape in parameter_shapes(parameters).items():
        length = -(-math.prod(shape) // ranks)
        tensors = {
            kind: torch.randn(length, generator=generator) for kind in ("master", "exp_avg", "exp_avg_sq")
        }
        fragments.append(
            Fragment(name, shape, rank * length, tensors, torch.tensor(5.0), Placement.whole(shape))
        )
    return TrainingState(fragments, {"step": 5})


class Computation:
    """A forward and a backward pass through a whole model's matrices on few tokens."""

    def __init__(self, parameters: int, tokens: int) -> None:
        shapes = [shape for shape in parameter_shapes(parameters).values() if len(shape) == 2]
        self._weights = [torch.full(shape, 1e-3, requires_grad=True) for shape in shapes]
        self._inputs = torch.ones(tokens, WIDTH, requires_grad=True)

    def run(self) -> None:
        """Gradients of weights and inputs; about 6 operations per parameter and token."""
        for weight in self._weights:
            weight.grad = None
        outputs = [nn.functional.linear(self._inputs, weight) for weight in self._weights]
        torch.stack([output.mean() for output in outputs]).sum().backward()


def write_raw(path: Path, state: TrainingState) -> None:
    """The bytes of the state in one file, block by block, and fsync."""
    with path.open("wb", buffering=0) as file:
        for fragment in state.fragments:
            for tensor in fragment.tensors.values():
                data = tensor.numpy().data.cast("B")
                for start in range(0, len(data), BLOCK_BYTES):
                    file.write(data[start : start + BLOCK_BYTES])
        os.fsync(file.fileno())


def read_raw(path: Path) -> None:
    """All bytes of a file, into one reused block."""
    block = bytearray(BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def drop_from_cache(path: Path) -> None:
    """Make the next reads of a file, or of a folder's files, come from the disk."""
    for file in path.iterdir() if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class Clock:
    """Times what all ranks do together: from a barrier until the slowest is done."""

    def __init__(self) -> None:
        self.timings: Timings = defaultdict(list)

    def time(self, name: str, function: Callable[[], object]) -> None:
        """Run on every rank; the longest time counts."""
        dist.barrier()
        began = time.perf_counter()
        function()
        self.note(name, time.perf_counter() - began)

    def note(self, name: str, seconds: float) -> None:
        """Record the longest of the ranks' figures."""
        longest = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        self.timings[name].append(longest.item())


@dataclass(frozen=True)
class Settings:
    """The command line's choices."""

    parameters: int
    ranks: int
    rounds: int
    tokens: int


def measure(rank: int, settings: Settings, folder: Path) -> None:
    """One rank of the measurement; rank 0 leaves `timings.json` in the folder."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    ranks, rounds = settings.ranks, settings.rounds
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=ranks
    )
    clock = Clock()
    state = make_state(settings.parameters, rank, ranks)
    computation = Computation(settings.parameters, settings.tokens)
    computation.run()
    synchronous, asynchronous = (
        CheckpointStore(
            folder / name,
            group=dist.new_group(backend="gloo"),
            keep_last=rounds if name == "sync" else 1,
            asynchronous=name == "async",
        )
        for name in ("sync", "async")
    )
    for round_ in range(rounds):
        raw = folder / f"raw{rank}.{round_}"
        measure_writing(clock, state, synchronous, raw, round_)
        measure_blocking(clock, state, asynchronous, computation, 2 * round_)
        measure_reading(clock, state, synchronous.folder / f"step_{round_:08d}", raw)
        # Old bytes go when the new ones are there, so that every write is to fresh pages, as in a run
        (folder / f"raw{rank}.{round_ - 1}").unlink(missing_ok=True)
        if rank == 0 and round_ > 0:
            shutil.rmtree(synchronous.folder / f"step_{round_ - 1:08d}")
    if rank == 0:
        (folder / "timings.json").write_text(to_json(clock.timings))
    dist.barrier()
    dist.destroy_process_group()


def measure_writing(
    clock: Clock, state: TrainingState, synchronous: CheckpointStore, raw: Path, round_: int
) -> None:
    """The same bytes as they are, and as a checkpoint that the caller waits for."""
    writes: list[tuple[str, Callable[[], object]]] = [
        ("raw write + fsync", lambda: write_raw(raw, state)),
        ("synchronous save", lambda: synchronous.save(round_, state)),
    ]
    for name, write in writes if round_ % 2 == 0 else reversed(writes):
        os.sync()
        clock.time(name, write)


def measure_blocking(
    clock: Clock, state: TrainingState, store: CheckpointStore, computation: Computation, step: int
) -> None:
    """Two asynchronous saves: one with a computation before the update, one without."""
    clock.time("computation alone", computation.run)
    dist.barrier()
    store.save(step, state)
    clock.time("computation beside the save", computation.run)
    store.wait_staged()
    clock.note("blocked, first save" if step == 0 else "blocked", store.blocked_s)
    clock.time("rest of the asynchronous writing", store.wait)
    dist.barrier()
    store.save(step + 1, state)
    store.wait_staged()
    clock.note("blocked if the update came at once", store.blocked_s)
    store.wait()


def measure_reading(clock: Clock, state: TrainingState, path: Path, raw: Path) -> None:
    """Loading the synchronous save and reading the raw file, from the disk and from the cache."""
    for source in ("disk", "cache"):
        if source == "disk":
            drop_from_cache(raw)
        clock.time(f"raw read, {source}", lambda: read_raw(raw))
        fresh = CheckpointStore(path.parent, group=dist.new_group(backend="gloo"), keep_last=1)
        if source == "disk":
            drop_from_cache(path)
        clock.time(f"load + verify, {source}", partial(fresh.load, path, state))


def report(timings: Timings, settings: Settings) -> dict[str, object]:
    """Medians and ratios, as printed and written."""
    seconds = {name: statistics.median(values) for name, values in timings.items()}
    ratios = {
        "synchronous save / raw write (at most 1.2)": seconds["synchronous save"]
        / seconds["raw write + fsync"],
        "the same, fastest of each": min(timings["synchronous save"]) / min(timings["raw write + fsync"]),
        "blocked / synchronous save (at most 0.05)": seconds["blocked"] / seconds["synchronous save"],
        "blocked, first save / synchronous save": seconds["blocked, first save"]
        / seconds["synchronous save"],
        "blocked if the update came at once / synchronous save": seconds["blocked if the update came at once"]
        / seconds["synchronous save"],
        "speed of load + verify / raw read, disk (at least 0.5)": seconds["raw read, disk"]
        / seconds["load + verify, disk"],
        "speed of load + verify / raw read, cache": seconds["raw read, cache"]
        / seconds["load + verify, cache"],
    }
    actual = sum(math.prod(shape) for shape in parameter_shapes(settings.parameters).values())
    return {
        "parameters": actual,
        "bytes": 12 * actual,
        "ranks": settings.ranks,
        "tokens_per_rank": settings.tokens,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": seconds,
        "all_seconds": timings,
        "ratios": ratios,
    }


def print_report(result: dict[str, object]) -> None:
    """Two tables: times and ratios."""
    console = Console()
    seconds, ratios = result["seconds"], result["ratios"]
    assert isinstance(seconds, dict) and isinstance(ratios, dict) and isinstance(result["bytes"], int)
    table = Table("what", "seconds", "GB/s", title=f"{result['bytes']:,} bytes on {result['ranks']} ranks")
    for name, value in seconds.items():
        moves_all = any(word in name for word in MOVING)
        table.add_row(name, f"{value:.3f}", f"{result['bytes'] / value / 1e9:.2f}" if moves_all else "")
    console.print(table)
    console.print(
        f"The computation, {result['tokens_per_rank']} tokens per rank, takes "
        f"{seconds['computation alone']:.2f} s alone and {seconds['computation beside the save']:.2f} s "
        "beside the save."
    )
    table = Table("ratio", "value")
    for name, value in ratios.items():
        table.add_row(name, f"{value:.3f}")
    console.print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=float, default=100e6, help="about how many (100e6)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="medians are over these, at least 2")
    parser.add_argument("--tokens", type=int, default=128, help="per rank, computed beside the copy (128)")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    settings = Settings(
        int(arguments.parameters), arguments.ranks, max(2, arguments.rounds), arguments.tokens
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="checkpoint-") as name:
        folder = Path(name)
        spawn(measure, (settings, folder), nprocs=settings.ranks)
        timings = json.loads((folder / "timings.json").read_text())
    result = report(timings, settings)
    print_report(result)
    if arguments.out:
        arguments.out.write_text(to_json(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
