"""Sigmoid against softmax at the demo size: equal tokens, equal recipe, several seeds.

    python -m benchmarks.twins --seeds 3 --steps 600 --out benchmarks/results/twins.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import demo_dataset, save


def validation_loss(family: str, seed: int, steps: int, data: Path, extra: list[str]) -> float:
    """Nats per token on the validation split after `steps`."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"run.seed={seed}",
            f"run.steps={steps}",
            f"run.folder={folder}",
            "run.name=twin",
            f"data.path={data}",
            "checkpoint.save_every_steps=null",
            "monitor.evaluate_every_steps=null",
            "monitor.evaluate_rows=null",
            "monitor.sample_every_steps=null",
        ]
        command = [sys.executable, "-m", "pretrain.cli", "train", f"configs/{family}/demo.yaml", *settings, *extra]
        subprocess.run(command, check=True, timeout=3600, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = (Path(folder) / "twin" / "logs" / "metrics.jsonl").read_text().splitlines()
    return [record["loss/validation"] for record in map(json.loads, lines) if "loss/validation" in record][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=None, help="write JSON here")
    parser.add_argument("overrides", nargs="*", help="settings for both, e.g. model.positions=alibi")
    arguments = parser.parse_args()
    data = demo_dataset()
    losses: dict[str, list[float]] = {"sigmoid": [], "softmax": []}
    for seed in range(1, arguments.seeds + 1):
        for family, found in losses.items():
            found.append(validation_loss(family, seed, arguments.steps, data, arguments.overrides))
        print(f"seed {seed}: sigmoid {losses['sigmoid'][-1]:.4f}  softmax {losses['softmax'][-1]:.4f} nats/token", flush=True)
    gaps = [a - b for a, b in zip(losses["sigmoid"], losses["softmax"], strict=True)]
    mean, spread = statistics.mean(gaps), statistics.stdev(gaps) if len(gaps) > 1 else 0.0
    print(f"gap sigmoid - softmax: {mean:+.4f} nats/token, standard deviation over seeds {spread:.4f}")
    facts = {"steps": arguments.steps, "overrides": arguments.overrides, "validation_loss": losses}
    save({**facts, "gaps": gaps, "mean_gap": mean}, arguments.out)


if __name__ == "__main__":
    main()
