"""The demo configs side by side: the same data, width and tokens, each with its own recipe, several seeds.

python -m benchmarks.twins --seeds 3 --steps 600 --out benchmarks/results/twins.json
python -m benchmarks.twins --models sigmoid,softmax,pararnn/gru,pararnn/lstm,mamba2 --seeds 1 --steps 400
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


def validation_loss(model: str, seed: int, steps: int, data: Path, extra: list[str]) -> float:
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
        command = [
            sys.executable,
            "-m",
            "pretrain.cli",
            "train",
            f"configs/{model}/demo.yaml",
            *settings,
            *extra,
        ]
        subprocess.run(
            command, check=True, timeout=3600, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        lines = (Path(folder) / "twin" / "logs" / "metrics.jsonl").read_text().splitlines()
    return [record["loss/validation"] for record in map(json.loads, lines) if "loss/validation" in record][-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        default="sigmoid,softmax",
        help="folders of configs/ with a demo.yaml; the first is compared",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=None, help="write JSON here")
    parser.add_argument("overrides", nargs="*", help="settings for all, e.g. run.device=cpu")
    arguments = parser.parse_args()
    data = demo_dataset()
    losses: dict[str, list[float]] = {model: [] for model in arguments.models.split(",")}
    for seed in range(1, arguments.seeds + 1):
        for model, found in losses.items():
            found.append(validation_loss(model, seed, arguments.steps, data, arguments.overrides))
            print(f"seed {seed}: {model} {found[-1]:.4f} nats/token", flush=True)
    first, *others = losses
    gaps = {other: [a - b for a, b in zip(losses[first], losses[other], strict=True)] for other in others}
    for other, found in gaps.items():
        mean, spread = statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0.0
        print(f"gap {first} - {other}: {mean:+.4f} nats/token, standard deviation over seeds {spread:.4f}")
    facts = {"steps": arguments.steps, "overrides": arguments.overrides, "validation_loss": losses}
    save({**facts, "gaps": gaps}, arguments.out)


if __name__ == "__main__":
    main()
