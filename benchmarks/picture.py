"""The README's picture: validation losses of the families' demos, and digits that the tri-modal demo draws.

make quickstart-trimodal
for c in sigmoid softmax pararnn/gru pararnn/lstm mamba2 hybrid; do
    triptych train configs/$c/demo.yaml run.folder=runs/curves monitor.evaluate_every_steps=50
done
python -m benchmarks.picture runs/curves/* --digits benchmarks/results/digits.png --out docs/families.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import yaml
from matplotlib import pyplot


def curve(run: Path) -> tuple[str, list[int], list[float]]:
    """What a run is of, its steps and its validation losses in nats per token."""
    model = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["model"]
    name = model.get("cell") or (" + ".join(model["mixers"]) if "mixers" in model else model["family"])
    records = map(json.loads, (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    found = [(line["step"], line["loss/validation"]) for line in records if "loss/validation" in line]
    return name, [step for step, _ in found], [loss for _, loss in found]


def draw(runs: list[Path], digits: Path, out: Path) -> None:
    mpl.use("agg")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), width_ratios=(1.6, 1))
    for name, steps, losses in map(curve, runs):
        left.plot(steps, losses, label=f"{shortened(name)}  {losses[-1]:.2f}")
    left.set(xlabel="step", ylabel="validation loss, nats per token", title="the families' demos, 400 steps")
    left.set_ylim(top=6.5)  # below what counting letters gives
    left.legend(frameon=False, fontsize=8)
    left.spines[["top", "right"]].set_visible(False)
    right.imshow(pyplot.imread(digits), cmap="gray", interpolation="nearest")
    right.set(title="text to image: zero ... nine", xticks=[], yticks=[])
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def shortened(name: str) -> str:
    """A pattern of one mixer over and over, as how often."""
    parts = name.split(" + ")
    return " + ".join(
        f"{parts.count(part)} {part}" if parts.count(part) > 1 else part for part in dict.fromkeys(parts)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--digits", type=Path, required=True, help="what the tri-modal demo drew")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    draw(given.runs, given.digits, given.out)


if __name__ == "__main__":
    main()
