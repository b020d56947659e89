"""Measure saving and loading a checkpoint beside reading and writing the same bytes, in one run.

    python -m benchmarks.checkpoint --parameters 100e6 --ranks 2 --out checkpoint.json

Each rank holds an equal flat part of every parameter, as under ZeRO-1, of a Transformer-like list of matrices
and
vectors: weights and two moments in float32, 12 bytes per parameter. No training runs beside it. Times are
those of the slowest rank; the median of the rounds is reported. Reading is measured from the disk: the files'
pages are dropped from the page cache before each read (posix_fadvise), and once more from the cache.
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
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from pretrain.checkpoint import CheckpointStore, Fragment, Placement, TrainingState

BLOCK_BYTES = 4 << 20
LAYER_SHAPES = ((4, 1), (8, 1), (1,))  # multiples of the width: attention, feed-forward, a norm

Timings = dict[str, list[float]]


def parameter_shapes(parameters: int, width: int = 768) -> dict[str, tuple[int, ...]]:
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


def write_raw(path: Path, state: TrainingState) -> None:
    """The bytes of the state in one file, block by block, and fsync."""
    with path.open("wb", buffering=0) as file:
        for fragment in state.fragments:
            for tensor in fragment.tensors.values():
                data = memoryview(tensor.numpy()).cast("B")
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


def measure(rank: int, ranks: int, parameters: int, folder: Path, rounds: int) -> None:
    """One rank of the measurement; rank 0 leaves `timings.json` in the folder."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "rendezvous"), ranks), rank=rank, world_size=ranks
    )
    clock = Clock()
    state = make_state(parameters, rank, ranks)
    synchronous, asynchronous = (
        CheckpointStore(
            folder / name,
            group=dist.new_group(backend="gloo"),
            keep_last=rounds,
            asynchronous=name == "async",
        )
        for name in ("sync", "async")
    )
    for round_ in range(rounds):
        measure_round(clock, state, synchronous, asynchronous, folder / f"raw{rank}.{round_}", round_)
        # Old bytes go when the new ones are there, so that every write is to fresh pages, as in a run
        (folder / f"raw{rank}.{round_ - 1}").unlink(missing_ok=True)
        if rank == 0 and round_ > 0:
            for store in (synchronous, asynchronous):
                shutil.rmtree(store.folder / f"step_{round_ - 1:08d}")
    if rank == 0:
        (folder / "timings.json").write_text(json.dumps(clock.timings))
    dist.barrier()
    dist.destroy_process_group()


def measure_round(
    clock: Clock,
    state: TrainingState,
    synchronous: CheckpointStore,
    asynchronous: CheckpointStore,
    raw: Path,
    round_: int,
) -> None:
    """Everything once, each beside what it is compared with."""
    clock.time("raw write + fsync", lambda: write_raw(raw, state))
    clock.time("synchronous save", lambda: synchronous.save(round_, state))
    dist.barrier()
    blocked = asynchronous.save(round_, state)
    clock.note("blocked by asynchronous save, first" if round_ == 0 else "blocked, later", blocked)
    clock.time("asynchronous save in the background", asynchronous.wait)
    path = synchronous.folder / f"step_{round_:08d}"
    for source in ("disk", "cache"):
        if source == "disk":
            drop_from_cache(raw)
        clock.time(f"raw read, {source}", lambda: read_raw(raw))
        fresh = CheckpointStore(synchronous.folder, group=dist.new_group(backend="gloo"), keep_last=1)
        if source == "disk":
            drop_from_cache(path)
        clock.time(f"load + verify, {source}", partial(fresh.load, path, state))


def report(timings: Timings, parameters: int, ranks: int) -> dict[str, object]:
    """Medians and ratios, as printed and written."""
    seconds = {name: statistics.median(values) for name, values in timings.items()}
    ratios = {
        "synchronous save / raw write (at most 1.2)": seconds["synchronous save"]
        / seconds["raw write + fsync"],
        "blocked, later / synchronous save (at most 0.05)": seconds["blocked, later"]
        / seconds["synchronous save"],
        "blocked, first / synchronous save": seconds["blocked by asynchronous save, first"]
        / seconds["synchronous save"],
        "speed of load + verify / raw read, disk (at least 0.5)": seconds["raw read, disk"]
        / seconds["load + verify, disk"],
        "speed of load + verify / raw read, cache": seconds["raw read, cache"]
        / seconds["load + verify, cache"],
    }
    actual = sum(math.prod(shape) for shape in parameter_shapes(parameters).values())
    return {
        "parameters": actual,
        "bytes": 12 * actual,
        "ranks": ranks,
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
        table.add_row(name, f"{value:.3f}", f"{result['bytes'] / value / 1e9:.2f}")
    console.print(table)
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
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="checkpoint-") as name:
        folder = Path(name)
        mp.spawn(
            measure,
            (arguments.ranks, int(arguments.parameters), folder, max(2, arguments.rounds)),
            nprocs=arguments.ranks,
        )
        timings = json.loads((folder / "timings.json").read_text())
    result = report(timings, int(arguments.parameters), arguments.ranks)
    print_report(result)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
