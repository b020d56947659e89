"""Measure an asynchronous save of a whole 1B model's state from four ranks, beside a raw write of the same bytes.

    python -m benchmarks.save_1b --out benchmarks/results/save-1b.json

The parameters are those of a shipped config, cut to fewer layers: by default the 1B sigmoid model with 19 blocks,
1.04e9 parameters, whose float32 weights and moments are 12.5 GB. They are flattened and cut into equal shares, one per
rank, as ZeRO 1 does, so that cuts fall inside parameters. The state takes little memory, as where it lies on GPUs:
all views are windows of one block of random numbers per rank, larger than the processor's cache. What is read and
written is as much as for a real state.

In each round every rank writes its bytes to a file of its own and syncs it, all at once, and the ranks save
through CheckpointStore; they take turns at being first, and each begins with nothing left to write back. "Until
whole" is the time from `save` to the committed manifest. "Blocked if the update came at once" is what a step without
any computation would wait: the time in `save` and in `wait_staged` right after it, in which all is copied.
The first round, in which the staging buffer is allocated, stands apart. Peak memory is the rise of a rank's VmHWM
during the save. Both writes slow down when other programs use the processor, saving more: it computes checksums.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from benchmarks.checkpoint import Clock, Timings, write_raw
from benchmarks.common import save
from models import families
from pretrain.checkpoint import CheckpointStore, Fragment, Placement, TrainingState
from pretrain.checkpoint.fragments import TENSOR_KINDS
from pretrain.config import load_config
from pretrain.json_text import to_json
from pretrain.plan.parameters import resolved

POOL_ELEMENTS = 64 << 20  # 256 MB: more than a processor's cache
WINDOW_STEP = 1_000_003  # a prime, so that windows of equal length differ


@dataclass(frozen=True)
class Settings:
    """The command line's choices."""

    config: Path
    layers: int
    ranks: int
    rounds: int


def parameter_shapes(settings: Settings) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's parameters, in the model's order."""
    config = resolved(load_config(settings.config, [f"model.layers={settings.layers}"]))
    with torch.device("meta"):
        model = families[config.model.family].build(config.model)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def shares(shapes: dict[str, tuple[int, ...]], rank: int, ranks: int) -> dict[str, tuple[int, int]]:
    """Of each parameter that a rank has a part of: first element and one past the last.

    Matrices and vectors are cut apart, as ZeRO 1 cuts each group of parameters.
    """
    owned: dict[str, tuple[int, int]] = {}
    for is_matrix in (True, False):
        sizes = {
            name: torch.Size(shape).numel() for name, shape in shapes.items() if (len(shape) > 1) == is_matrix
        }
        each = -(-sum(sizes.values()) // ranks)
        position = 0
        for name, size in sizes.items():
            first, last = max(0, rank * each - position), min(size, (rank + 1) * each - position)
            if first < last:
                owned[name] = (first, last)
            position += size
    return owned


class Windows:
    """Hands out views of one block of random numbers, each at another place."""

    def __init__(self, elements: int, seed: int) -> None:
        self._pool = torch.randn(elements, generator=torch.Generator().manual_seed(seed))
        self._position = 0

    def take(self, length: int) -> Tensor:
        """A 1-D view; at most as long as the block."""
        self._position = (self._position + WINDOW_STEP) % (self._pool.numel() - length + 1)
        return self._pool[self._position : self._position + length]


def make_state(settings: Settings, rank: int) -> TrainingState:
    """A rank's share of all parameters and moments."""
    shapes = parameter_shapes(settings)
    owned = shares(shapes, rank, settings.ranks)
    longest = max(last - first for first, last in owned.values())
    windows = Windows(max(POOL_ELEMENTS, longest + WINDOW_STEP), rank)
    step = torch.tensor(5.0)
    fragments = [
        Fragment(
            name,
            shapes[name],
            first,
            {kind: windows.take(last - first) for kind in TENSOR_KINDS},
            step,
            Placement.whole(shapes[name]),
        )
        for name, (first, last) in owned.items()
    ]
    return TrainingState(fragments, {"step": 5})


def state_bytes(state: TrainingState) -> int:
    """Bytes of a rank's tensors."""
    return sum(tensor.nbytes for fragment in state.fragments for tensor in fragment.tensors.values())


class PeakMemory:
    """The rise of this process's peak resident memory since it was created (Linux)."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
        self._before = self._peak()

    def rise(self) -> int:
        return self._peak() - self._before

    @staticmethod
    def _peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith("VmHWM")]
        return 1024 * int(line.split()[1])


def measure(rank: int, settings: Settings, folder: Path) -> None:
    """One rank of the measurement; rank 0 leaves `timings.json` in the folder."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=settings.ranks)
    state = make_state(settings, rank)
    store = CheckpointStore(folder / "steps", group=dist.new_group(backend="gloo"), keep_last=2)
    first, others = Clock(), Clock()
    for round_ in range(settings.rounds + 1):
        measure_round(first if round_ == 0 else others, state, store, folder / f"raw{rank}", round_)
    first.note("bytes of the largest share", state_bytes(state))
    first.note("staging buffer of a rank", store.staging_bytes)
    if rank == 0:
        (folder / "timings.json").write_text(to_json([first.timings, others.timings]))
    dist.barrier()
    dist.destroy_process_group()


def measure_round(clock: Clock, state: TrainingState, store: CheckpointStore, raw: Path, round_: int) -> None:
    """Both writes, in turn the one or the other first. What the round before wrote goes when its like is there: memory
    of removed files is given back to the host of a virtual machine, and costs time to get again."""
    new = raw.with_suffix(".new")

    def write_raw_file() -> None:
        measure_raw(clock, state, new)
        new.rename(raw)

    def save_step() -> None:
        measure_save(clock, state, store, round_)
        if dist.get_rank() == 0 and round_ > 0:
            shutil.rmtree(store.folder / f"step_{round_ - 1:08d}")

    writes = [write_raw_file, save_step]
    for write in writes if round_ % 2 == 0 else reversed(writes):
        os.sync()
        dist.barrier()
        write()
        dist.barrier()


def measure_raw(clock: Clock, state: TrainingState, path: Path) -> None:
    """The bytes as they are."""
    memory = PeakMemory()
    clock.time("raw write + fsync", lambda: write_raw(path, state))
    clock.note("peak memory of the raw write", memory.rise())


def measure_save(clock: Clock, state: TrainingState, store: CheckpointStore, step: int) -> None:
    """One asynchronous save until it is whole."""

    def until_whole() -> None:
        store.save(step, state)
        in_save.append(store.blocked_s)
        store.wait_staged()
        store.wait()

    in_save: list[float] = []
    memory = PeakMemory()
    clock.time("until whole", until_whole)
    clock.note("blocked in save", in_save[0])
    clock.note("blocked if the update came at once", store.blocked_s)
    clock.note("peak memory of the save", memory.rise())


def report(first: Timings, others: Timings, settings: Settings) -> dict[str, object]:
    """The first round, the others, and their medians."""
    elements = sum(torch.Size(shape).numel() for shape in parameter_shapes(settings).values())
    medians = {name: statistics.median(values) for name, values in others.items()}
    pairs = zip(others["raw write + fsync"], others["until whole"], strict=True)
    return {
        "config": str(settings.config),
        "layers": settings.layers,
        "ranks": settings.ranks,
        "parameters": elements,
        "bytes": 12 * elements,
        "first round": first,
        "other rounds": others,
        "medians": medians,
        "save's speed / raw write's (at least 0.6)": medians["raw write + fsync"] / medians["until whole"],
        "the same, each round": [raw / whole for raw, whole in pairs],
        "peak memory of the first save / share": first["peak memory of the save"][0]
        / first["bytes of the largest share"][0],
    }


def print_report(result: dict[str, object]) -> None:
    """The rounds side by side, and the ratios."""
    first, others, console = result["first round"], result["other rounds"], Console()
    assert isinstance(first, dict) and isinstance(others, dict)
    title = f"{result['bytes']:,} bytes on {result['ranks']} ranks"
    table = Table("what", "first round", "other rounds", title=title)
    for name, values in first.items():
        in_bytes = any(word in name for word in ("memory", "bytes", "buffer"))
        words = [
            f"{value / 1e9:.3f} GB" if in_bytes else f"{value:.3f} s"
            for value in values + others.get(name, [])
        ]
        table.add_row(name, words[0], "  ".join(words[1:]))
    console.print(table)
    for name, value in result.items():
        if isinstance(value, float):
            console.print(f"{name}: {value:.3f}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/sigmoid/1b.yaml"))
    parser.add_argument("--layers", type=int, default=19, help="instead of the config's (19)")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4, help="after the first one (4)")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    settings = Settings(arguments.config, arguments.layers, arguments.ranks, arguments.rounds)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="save-1b-") as name:
        folder = Path(name)
        spawn(measure, (settings, folder), nprocs=settings.ranks)
        first, others = json.loads((folder / "timings.json").read_text())
    result = report(first, others, settings)
    print_report(result)
    save(result, arguments.out)


if __name__ == "__main__":
    main()
