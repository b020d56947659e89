"""What the framework costs: `triptych train` against a bare PyTorch loop over the same model and optimizer.

Runs the two in turn, each in a process of its own, and prints the ratio of their tokens/s pair by pair.

    python -m benchmarks.framework
    python -m benchmarks.framework --shape small --pairs 7 --zero 1 --out benchmarks/results/framework.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import demo_dataset, save
from pretrain.json_text import to_json

SHAPES = {
    "small": {"layers": 4, "width": 128, "heads": 4, "length": 64, "rows": 12, "steps": 300, "target": 0.90},
    "medium": {"layers": 6, "width": 384, "heads": 6, "length": 256, "rows": 16, "steps": 24, "target": 0.97},
}


def overrides(shape: dict[str, Any], data: Path, folder: str, zero: int) -> list[str]:
    return [
        f"model.layers={shape['layers']}",
        f"model.width={shape['width']}",
        f"model.heads={shape['heads']}",
        f"data.sequence_length={shape['length']}",
        f"data.global_batch_rows={shape['rows']}",
        f"data.path={data}",
        f"run.steps={shape['steps']}",
        f"run.folder={folder}",
        "optim.warmup_steps=10",
        "checkpoint.save_every_steps=null",
        "monitor.evaluate_every_steps=null",
        "monitor.evaluate_rows=8",
        "monitor.sample_every_steps=null",
        "monitor.sample_tokens=1",
        f"parallel.zero={zero}",
    ]


def measure_triptych(shape: dict[str, Any], data: Path, zero: int) -> float:
    """Tokens/s of the second half of a real `triptych train`, from its own log."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pretrain.cli", "train", "configs/sigmoid/demo.yaml"]
        settings = overrides(shape, data, folder, zero)
        subprocess.run(
            [*command, *settings],
            check=True,
            timeout=900,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        lines = (Path(folder) / "demo" / "logs" / "metrics.jsonl").read_text().splitlines()
    logged = [record for record in map(json.loads, lines) if "speed/step_seconds" in record]
    late = [record for record in logged if record["step"] > shape["steps"] // 2]
    return (
        shape["rows"] * shape["length"] / statistics.median(record["speed/step_seconds"] for record in late)
    )


def measure_bare(shape: dict[str, Any], data: Path) -> float:
    """Tokens/s of the second half of the bare loop, averaged over as many steps as the other logs at a time."""
    command = [sys.executable, "-m", "benchmarks.framework", "--bare", to_json(shape), "--data", str(data)]
    done = subprocess.run(command, check=True, timeout=900, capture_output=True, text=True)
    return float(done.stdout.strip().splitlines()[-1])


def bare_loop(shape: dict[str, Any], data: Path) -> float:
    """A plain training loop: no engine, no hooks, batches in memory."""
    import torch

    from data_pipelines.rows.cut_rows import RowReader, Source, open_sources
    from data_pipelines.stream.stream import keep_freed_memory
    from data_pipelines.tokens.tokenizer_loading import load_tokenizer
    from models import families
    from models.initialise import initialise
    from pretrain.config import load_config
    from pretrain.objectives import build_objective
    from pretrain.optim import build_optimizer, parameter_groups, schedule_factor, set_learning_rate

    config = load_config("configs/sigmoid/demo.yaml", overrides(shape, data, "runs", 0))
    sources = open_sources([Source(path=str(data), weight=1)], split="train")
    vocabulary = -(-load_tokenizer(data).vocabulary // 64) * 64
    model_config = config.model.resolved(vocabulary=vocabulary, sequence_length=shape["length"])
    model = families[config.model.family].build(model_config)
    initialise(model, 1)
    optimizer = build_optimizer(
        parameter_groups(model.named_parameters(), model.declared, config.optim, shape["width"]), config.optim
    )
    objective = build_objective(config)
    keep_freed_memory()  # triptych sets it too; without it the bare loop loses up to a tenth to page faults
    reader = RowReader(sources, sequence_length=shape["length"], seed=1)
    batches = [reader.batch(range(s * shape["rows"], (s + 1) * shape["rows"])) for s in range(shape["steps"])]
    seconds = []
    for step, batch in enumerate(batches):
        since = time.perf_counter()
        set_learning_rate(optimizer.param_groups, schedule_factor(config.optim, step, shape["steps"]))
        loss = objective(model, batch).total / batch.weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - since)
    late = seconds[shape["steps"] // 2 :]
    window = config.monitor.log_every_steps
    means = [statistics.mean(late[i : i + window]) for i in range(0, len(late) - window + 1, window)]
    return shape["rows"] * shape["length"] / statistics.median(means or late)


def compare(name: str, pairs: int, zero: int, data: Path) -> dict[str, Any]:
    shape = SHAPES[name]
    ours, bare = [], []
    for _ in range(pairs):
        ours.append(measure_triptych(shape, data, zero))
        bare.append(measure_bare(shape, data))
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    result = {
        "shape": shape,
        "zero": zero,
        "triptych_tokens_per_second": ours,
        "bare_tokens_per_second": bare,
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
        "ratio_of_best": max(ours) / max(bare),
    }
    print(
        f"{name:7s} ZeRO {zero}: triptych {statistics.median(ours):9,.0f} tokens/s   "
        f"bare {statistics.median(bare):9,.0f} tokens/s   "
        f"ratio {result['median_ratio']:.3f} (median of {pairs} pairs, {min(ratios):.3f}-{max(ratios):.3f}; "
        f"best against best {result['ratio_of_best']:.3f}), wanted {shape['target']}"
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--zero", type=int, default=1, help="ZeRO stage of the triptych runs")
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None, help="write JSON here")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    data = arguments.data or demo_dataset()
    if arguments.bare:
        print(bare_loop(json.loads(arguments.bare), data))
        return
    names = list(SHAPES) if arguments.shape == "all" else [arguments.shape]
    save({name: compare(name, arguments.pairs, arguments.zero, data) for name in names}, arguments.out)


if __name__ == "__main__":
    main()
