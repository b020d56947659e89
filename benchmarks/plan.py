"""What `triptych plan` says of memory and of traffic, against what ranks hold and send.

Trains two steps of a small model of every family in many layouts, on real ranks (gloo, CPU), under the tracker that
the plan itself uses: the most bytes of tensors alive at any time of the second step, and the bytes through its
collectives, by axis. Calls of less than 64 bytes are sums of losses and norms, and those of one rank with
itself send nothing: neither is counted.

    python -m benchmarks.plan
    python -m benchmarks.plan --models sigmoid gru --out benchmarks/results/plan.json
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import save
from pretrain.config import Config, load_config
from pretrain.hardware import ACCELERATORS
from pretrain.objectives import build_objective
from pretrain.parallel.mesh import build_mesh
from pretrain.parallel.ranks import ranks_from_environment, start_process_group
from pretrain.plan.estimate import Layout, plan_layout, resolved
from pretrain.plan.simulate import axis_names
from pretrain.plan.tracker import TensorTracker
from pretrain.run import build_engine
from pretrain.run_data import open_run_data
from tests.corpus import build_corpus
from tests.e2e.pairs import TASKS, build_pairs
from tests.harness import run_ranks

MODELS = {
    "sigmoid": "{family: sigmoid, heads: 8, mlp_width: 512, positions: alibi}",
    "softmax": "{family: softmax, heads: 8, mlp_width: 512, positions: rope}",
    "gru": "{family: pararnn, cell: gru, heads: 4, mlp_width: 512}",
    "lstm": "{family: pararnn, cell: lstm, heads: 4, mlp_width: 512}",
    "mamba2": "{family: mamba2, heads: 8, state_width: 16, chunk: 16}",
    "trimodal": "{family: trimodal, heads: 8, mlp_width: 512}",
}
RUN = """
run: {{name: planned, folder: {folder}, steps: 4, device: cpu}}
model: {{{model}, layers: 8, width: 192}}
objective: {{kind: {objective}}}
data: {{path: {data}, sequence_length: 128, global_batch_rows: 16, micro_batch_rows: 4}}
optim: {{lr: 1e-3, warmup_steps: 1}}
"""
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1 process, ZeRO 0": (1, ("parallel.zero=0",)),
    "1 process, ZeRO 1": (1, ("parallel.zero=1",)),
    "dp2 ZeRO 0": (2, ("parallel.zero=0",)),
    "dp2 ZeRO 1": (2, ("parallel.zero=1",)),
    "dp2 ZeRO 2": (2, ("parallel.zero=2",)),
    "dp2 ZeRO 3": (2, ("parallel.zero=3",)),
    "dp2 ZeRO 1, full checkpointing": (2, ("parallel.zero=1", "parallel.activation_checkpointing=full")),
    "dp2 ZeRO 1, selective": (2, ("parallel.zero=1", "parallel.activation_checkpointing=selective")),
    **{
        f"dp2 ZeRO {zero}, offload": (2, (f"parallel.zero={zero}", "parallel.offload=optimizer"))
        for zero in (1, 2, 3)
    },
    "tp2": (2, ("parallel.zero=1", "parallel.tensor=2")),
    "tp2 sp": (2, ("parallel.zero=1", "parallel.tensor=2", "parallel.sequence=true")),
    "cp2": (2, ("parallel.zero=1", "parallel.context=2")),
    "tp2 cp2": (4, ("parallel.zero=1", "parallel.tensor=2", "parallel.context=2")),
    "pp2 1F1B": (2, ("parallel.zero=1", "parallel.pipeline=2")),
    "pp2 interleaved": (2, ("parallel.zero=1", "parallel.pipeline=2", "parallel.pipeline_chunks=2")),
    "pp2 dp2": (4, ("parallel.zero=1", "parallel.pipeline=2")),
    "tp2 pp2 sp": (
        4,
        ("parallel.zero=1", "parallel.pipeline=2", "parallel.tensor=2", "parallel.sequence=true"),
    ),
}
SMALL_CALL = 64
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


def plan_rank(path: Path, overrides: Sequence[str], world: int) -> Layout:
    """The plan, in a process that has no process group yet."""
    torch.distributed.destroy_process_group()
    config: Config = resolved(load_config(path, list(overrides)))
    return plan_layout(config, world, ACCELERATORS["h100"], on_cpu=True)


def compare(path: Path, world: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Planned and measured: the most bytes over all ranks, and the traffic of the rank that the plan looks at."""
    (layout,) = run_ranks(1, plan_rank, path, overrides, world, timeout_s=120)
    ranks = run_ranks(world, measure_rank, path, overrides, timeout_s=240)
    measured = max(rank.bytes for rank in ranks)
    planned = layout.memory.total + layout.memory.host  # here both are the host's
    # Megatron numbers the ranks of a stage one after the other.
    pipeline = load_config(path, list(overrides)).parallel.pipeline
    looked_at = ranks[layout.stage * world // pipeline]
    return {
        "planned_bytes": planned,
        "measured_bytes": measured,
        "planned_over_measured": planned / measured,
        "planned_traffic": by_axis(layout.traffic),
        "measured_traffic": looked_at.traffic,
    }


def write_run(folder: Path, name: str) -> Path:
    several = name == "trimodal"
    data = folder / "corpus" if not several else folder / "pairs"
    path = folder / f"{name}.yaml"
    sources = ", ".join(str(data / source) for source in ("text", *TASKS)) if several else ""
    path.write_text(
        RUN.format(
            folder=folder / "runs",
            data=f"[{sources}]" if several else data,
            objective="masked_diffusion" if several else "next_token",
            model=MODELS[name].strip("{}"),
        ),
        encoding="utf-8",
    )
    return path


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
    parser.add_argument("--layouts", nargs="+", choices=[*LAYOUTS], default=[*LAYOUTS])
    parser.add_argument("--out", type=Path, default=None, help="write JSON here")
    arguments = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_corpus(folder, documents=60).rename(folder / "corpus")
        build_pairs(folder / "pairs")
        for model in arguments.models:
            path = write_run(folder, model)
            found[model] = {}
            for layout in arguments.layouts:
                world, overrides = LAYOUTS[layout]
                found[model][layout] = compare(path, world, overrides)
            show(model, found[model], console)
    save(found, arguments.out)


if __name__ == "__main__":
    main()
