"""What `triptych plan` says of memory and of traffic, against what ranks hold and send.

Trains two steps of a small model of every family in many layouts, on real ranks (gloo, CPU), under the tracker that
the plan itself uses: the most bytes of tensors alive at any time of the second step, and the bytes through its
collectives, by axis. Calls of less than 16 bytes are sums of losses and norms, and those of one rank with
itself send nothing: neither is counted.

    python -m benchmarks.plan
    python -m benchmarks.plan --models sigmoid gru --out benchmarks/results/plan.json
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import save
from pretrain.assembly import build_engine
from pretrain.config import Config, load_config
from pretrain.hardware import ACCELERATORS
from pretrain.objectives import build_objective
from pretrain.parallel.mesh import build_mesh
from pretrain.parallel.ranks import ranks_from_environment, start_process_group
from pretrain.plan.estimate import Layout as PlannedLayout
from pretrain.plan.estimate import plan_layout
from pretrain.plan.parameters import resolved
from pretrain.plan.simulate import axis_names
from pretrain.plan.tracker import TensorTracker
from pretrain.run_data import open_run_data
from tests.harness import run_ranks
from tests.pretrain.parallel.runs import MODELS, Datasets, build_datasets, import_megatron, write_run
from tests.pretrain.parallel.table import LAYOUTS, Layout

SIZES = (
    "model.layers=8",
    "model.width=192",
    "data.sequence_length=128",
    "data.global_batch_rows=16",
    "data.micro_batch_rows=4",
)
"""Larger than the tests' tiny runs, whose tensors hardly outweigh the few bytes that no plan counts."""
PLANNED = {
    **{f"1 process, ZeRO {zero}": Layout(1, (f"parallel.zero={zero}",)) for zero in (0, 1)},
    **{f"dp2 ZeRO {zero}": LAYOUTS[f"dp2 ZeRO {zero}"] for zero in range(4)},
    **{
        f"dp2 ZeRO 1, {kind} checkpointing": LAYOUTS["dp2 ZeRO 1"].also(
            f"parallel.activation_checkpointing={kind}"
        )
        for kind in ("selective", "full")
    },
    **{
        f"dp2 ZeRO {zero}, offload": LAYOUTS[f"dp2 ZeRO {zero}"].also("parallel.offload=optimizer")
        for zero in (1, 2, 3)
    },
    **{
        name: LAYOUTS[name]
        for name in (
            "tp2",
            "tp2 sp",
            *(f"tp2 sp dp2 ZeRO {zero}" for zero in (1, 2, 3)),
            "cp2",
            "cp2 ZeRO 3",
            "tp2 sp cp2",
            "pp2 1F1B",
            "pp2 interleaved",
            "pp2 dp2 ZeRO 1",
            "tp2 sp pp2 ZeRO 1",
            "cp2 pp2",
        )
    },
}
STEPS = 4
SMALL_CALL = 16
AXES = ("tensor", "context", "pipeline", "replicas", "ends")


@dataclass(frozen=True)
class Measured:
    bytes: int
    traffic: dict[str, int]


def measure_rank(path: Path, overrides: Sequence[str]) -> Measured:
    """Of one rank: two steps, the second of which is counted."""
    torch.set_num_threads(1)
    gc.freeze()  # what the process that forked this one holds is no part of the run, and may be fake
    data = open_run_data(load_config(path, list(overrides)))
    config, device = data.config, torch.device("cpu")
    start_process_group(ranks_from_environment(), device)
    mesh = build_mesh(config.parallel)
    objective = build_objective(config, data.vocabulary)
    rows = config.data.global_batch_rows // mesh.data.size
    batch = objective.rows(data.train).batch(range(mesh.data.rank * rows, (mesh.data.rank + 1) * rows))
    engine = build_engine(config, mesh, device)
    engine.train_step(batch, objective, 1.0)
    time.sleep(0.1)  # the threads of gloo let go of what they have sent a moment later
    gc.collect()
    batch_bytes = sum(storage_bytes_of(batch).values())
    base = sum(storage_bytes().values()) - batch_bytes
    with TensorTracker(axis_names(mesh), smallest_call=SMALL_CALL) as tracker:
        engine.train_step(batch, objective, 1.0)
    alone = {axis for axis in AXES if axis != "ends" and getattr(mesh, axis).size == 1}
    return Measured(base + tracker.peak, by_axis(tracker.traffic, alone))


def storage_bytes() -> dict[int, int]:
    """Bytes of every storage that a live tensor stands on, by address; of tensors made since `gc.freeze`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    gradients = [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = [tensor.untyped_storage() for tensor in [*tensors, *gradients] if tensor.device.type != "meta"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def storage_bytes_of(batch: Any) -> dict[int, int]:
    """Bytes of the batch's storages, by address."""
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch._map_all(note)
    return found


def by_axis(traffic: Counter[tuple[str, str]], alone: Collection[str] = ()) -> dict[str, int]:
    found: Counter[str] = Counter()
    for (group, kind), size in traffic.items():
        # Interleaved, Megatron sends over one group of two ranks and receives over another.
        axis = "pipeline" if kind in ("send", "recv") else group
        if axis in AXES and axis not in alone:
            found[axis] += size
    return dict(sorted(found.items()))


def settings(model: str, name: str) -> list[str]:
    mlp = [] if model == "mamba2" else ["model.mlp_width=512"]  # Mamba-2 has none
    return [*SIZES, *mlp, *PLANNED[name].settings]


def plan_rank(path: Path, overrides: Sequence[str], world: int) -> PlannedLayout:
    """The plan, in a process that has no process group yet."""
    torch.distributed.destroy_process_group()
    config: Config = resolved(load_config(path, list(overrides)))
    return plan_layout(config, world, ACCELERATORS["h100"], on_cpu=True)


def compare(folder: Path, data: Datasets, model: str, name: str) -> dict[str, Any]:
    """Planned and measured: the most bytes over all ranks, and the traffic of the rank that the plan looks at."""
    path, world, overrides = write_run(folder, data, model, STEPS), PLANNED[name].ranks, settings(model, name)
    (layout,) = run_ranks(1, plan_rank, path, overrides, world, timeout_s=120)
    ranks = run_ranks(world, measure_rank, path, overrides, timeout_s=240)
    measured = max(rank.bytes for rank in ranks)
    planned = layout.memory.total + layout.memory.host  # here both are the host's
    # Megatron numbers the ranks of a stage one after the other.
    pipeline = load_config(path, overrides).parallel.pipeline
    looked_at = ranks[layout.stage * world // pipeline]
    return {
        "planned_bytes": planned,
        "measured_bytes": measured,
        "planned_over_measured": planned / measured,
        "planned_traffic": by_axis(layout.traffic),
        "measured_traffic": looked_at.traffic,
    }


def show(name: str, results: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table(f"{name}: layout", "planned MB", "measured MB", "ratio", "traffic planned = measured")
    for layout, one in results.items():
        planned, measured = one["planned_traffic"], one["measured_traffic"]
        same = "yes" if planned == measured else f"{planned} / {measured}"
        mb = (f"{one[key] / 1e6:.2f}" for key in ("planned_bytes", "measured_bytes"))
        table.add_row(layout, *mb, f"{one['planned_over_measured']:.4f}", same)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--layouts", nargs="+", choices=[*PLANNED], default=[*PLANNED], metavar="LAYOUT")
    parser.add_argument("--out", type=Path, default=None, help="write JSON here")
    arguments = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    found: dict[str, dict[str, Any]] = {model: {} for model in arguments.models}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = build_datasets(folder)
        import_megatron()
        for model, layout in track(
            [*product(arguments.models, arguments.layouts)], "layouts", console=console
        ):
            found[model][layout] = compare(folder, data, model, layout)
            save(found, arguments.out, quiet=True)
    for model, results in found.items():
        show(model, results, console)


if __name__ == "__main__":
    main()
