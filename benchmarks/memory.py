"""What `triptych plan` says of parameters, gradients and optimizer, against the bytes that the engine holds.

Trains two steps in every ZeRO stage on real ranks (gloo, CPU), and counts the storage of every tensor alive
that was not there before the engine was built, at the moment when gradients are all there: at the end of the
backward pass, before the reduction that drops what other ranks own (stages 0 and 1), or before the update
(stages 2 and 3, which reduce as they go). Also reports the peak resident memory of a demo process.

    python -m benchmarks.memory
    python -m benchmarks.memory --ranks 1 2 --out benchmarks/results/memory.json
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import tempfile
import warnings
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from benchmarks.common import demo_dataset, save

CASES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


def storage_bytes() -> dict[int, int]:
    """Bytes of every storage that a live tensor stands on, by address."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    gradients = [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = [tensor.untyped_storage() for tensor in [*tensors, *gradients] if tensor.device.type != "meta"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def measure_rank(
    rank: int, world: int, port: int, zero: int, dtype: str, data: str, queue: Queue[Any]
) -> None:
    """One rank: build the engine of a deep demo, train two steps, count."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "OMP_NUM_THREADS": "1",
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    import torch

    from data_pipelines.rows import RowReader
    from pretrain.config import load_config
    from pretrain.objectives import build_objective
    from pretrain.parallel.mesh import build_mesh
    from pretrain.parallel.ranks import ranks_from_environment, start_process_group
    from pretrain.plan.estimate import make_plan
    from pretrain.run import build_engine
    from pretrain.run_data import open_run_data

    torch.set_num_threads(1)
    # Sixteen layers: DeepSpeed keeps the gradient of a parameter that lies across a cut whole on both sides, which
    # is much of a tiny model and little of a real one.
    settings = [f"data.path={data}", f"parallel.zero={zero}", f"precision.dtype={dtype}", "model.layers=16"]
    run_data = open_run_data(load_config("configs/sigmoid/demo.yaml", settings))
    config = run_data.config
    start_process_group(ranks_from_environment(), torch.device("cpu"))
    mesh = build_mesh(config.parallel)
    rows = config.data.global_batch_rows // world
    reader: RowReader = run_data.train
    batch = reader.batch(range(rank * rows, (rank + 1) * rows))
    before = storage_bytes()
    engine = build_engine(config, mesh, torch.device("cpu"))
    moment = "_backward_epilogue" if zero < 2 else "step"
    go_on, counted = getattr(engine._engine, moment), []  # type: ignore[attr-defined]

    def counting() -> None:
        gc.collect()
        counted.append(sum(size for address, size in storage_bytes().items() if address not in before))
        go_on()

    setattr(engine._engine, moment, counting)  # type: ignore[attr-defined]
    for _ in range(2):
        engine.train_step(batch, build_objective(config), 1.0)
    plan = make_plan(config, gpus=world, gpu="h100", mfu=0.4).memory
    # DeepSpeed's gradient buffer is there when we count, but for ZeRO 2, which frees it before the update.
    queue.put((rank, counted[-1], plan.state + (plan.buffers if zero != 2 else 0)))


def measure(world: int, zero: int, dtype: str, data: Path) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue: Queue[Any] = context.Queue()
    ranks = [
        context.Process(target=measure_rank, args=(r, world, port, zero, dtype, str(data), queue))
        for r in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        found = sorted(queue.get(timeout=300) for _ in ranks)
    finally:
        for process in ranks:
            process.join(timeout=60)
            if process.is_alive():
                process.kill()
    worst = max(found, key=lambda item: abs(item[1] / item[2] - 1))
    return {
        "ranks": world,
        "zero": zero,
        "dtype": dtype,
        "measured_bytes": worst[1],
        "planned_bytes": worst[2],
        "planned_over_measured": worst[2] / worst[1],
    }


def demo_peak(data: Path) -> int:
    """Peak resident bytes of a `triptych train` of the demo's size, 20 steps."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"data.path={data}", f"run.folder={folder}", "run.steps=20", "optim.warmup_steps=5"]
        settings += ["monitor.evaluate_rows=24", "monitor.sample_tokens=8"]
        command = [sys.executable, "-m", "pretrain.cli", "train", "configs/sigmoid/demo.yaml", *settings]
        subprocess.run(command, check=True, timeout=600, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=None, help="write JSON here")
    arguments = parser.parse_args()
    data = demo_dataset()
    peak = demo_peak(data)
    print(f"peak resident memory of the demo process: {peak / 2**20:,.0f} MiB")
    results = []
    print("ranks  ZeRO  dtype   measured bytes    planned bytes   planned / measured")
    for world in arguments.ranks:
        for zero, dtype in CASES:
            result = measure(world, zero, dtype, data)
            results.append(result)
            print(
                f"{world:5d}  {zero:4d}  {dtype:5s}  {result['measured_bytes']:15,d}  {result['planned_bytes']:15,d}"
                f"   {result['planned_over_measured']:.4f}",
                flush=True,
            )
    save({"demo_peak_resident_bytes": peak, "cases": json.loads(json.dumps(results))}, arguments.out)


if __name__ == "__main__":
    main()
