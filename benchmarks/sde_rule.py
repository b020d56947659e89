"""Does the SDE rule make the batch a free choice? One config at several batches, equal tokens, with and without it.

python -m benchmarks.sde_rule --steps 1200 --jobs 2 --out benchmarks/results/sde-rule.json

Each arm trains `--config` for the same number of tokens at the base batch times each factor; with the rule, lr, betas,
epsilon and weight decay follow from the base's, without it they stay. Warm-up is the same share of tokens everywhere.
Reported: the validation bound in nats per token, and the spread over the batches. `--out` also draws a plot beside the
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import save
from pretrain.config import Config, load_config

HOURS = 3600


@dataclass(frozen=True)
class Arm:
    factor: float
    """Times the base batch."""
    rule: bool
    seed: int


def settings_of(arm: Arm, base: Config, steps: int) -> list[str]:
    """The overrides of one run."""
    rows = round(base.data.global_batch_rows * arm.factor)
    own_steps = round(steps / arm.factor)
    found = [
        f"run.steps={own_steps}",
        f"run.seed={arm.seed}",
        f"data.global_batch_rows={rows}",
        f"optim.warmup_steps={round(base.optim.warmup_steps * steps / base.run.steps / arm.factor)}",
        "run.name=arm",
        "checkpoint.save_every_steps=null",
        "monitor.evaluate_every_steps=null",
        "monitor.sample_every_steps=null",
        "monitor.tensorboard=false",
        f"monitor.log_every_steps={max(1, own_steps // 20)}",
    ]
    if arm.rule:
        found += ["optim.scaling.rule=sde", f"optim.scaling.base_rows={base.data.global_batch_rows}"]
    return found


def validation(arm: Arm, config: Path, base: Config, steps: int, extra: Sequence[str]) -> dict[str, float]:
    """The last evaluation of one run: the loss and the bounds by modality."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pretrain.cli", "train", str(config), f"run.folder={folder}"]
        command += [*settings_of(arm, base, steps), *extra]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=10 * HOURS,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
        lines = (Path(folder) / "arm" / "logs" / "metrics.jsonl").read_text().splitlines()
    last = [record for record in map(json.loads, lines) if "loss/validation" in record][-1]
    return {
        key: value for key, value in last.items() if key.startswith(("loss/validation", "validation_elbo/"))
    }


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    base = load_config(arguments.config, arguments.overrides)
    factors = [float(factor) for factor in arguments.factors.split(",")]
    arms = [
        Arm(factor, rule, seed)
        for seed in range(1, arguments.seeds + 1)
        for factor in factors
        for rule in (True, False)
        if rule or factor != 1
    ]

    def one(arm: Arm) -> dict[str, Any]:
        found = validation(arm, arguments.config, base, arguments.steps, arguments.overrides)
        print(
            f"batch x {arm.factor:g}, {'rule' if arm.rule else 'fixed'}: {found['loss/validation']:.4f}",
            flush=True,
        )
        return {**vars(arm), **found}

    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(one, arms))
    # At the base batch the rule changes nothing: one run stands for both.
    return found + [{**record, "rule": False} for record in found if record["factor"] == 1]


def by_batch(records: list[dict[str, Any]], *, rule: bool) -> dict[float, float]:
    """Mean validation loss over seeds, by the batch's factor."""
    factors = sorted({record["factor"] for record in records})
    mine = [record for record in records if record["rule"] is rule]
    found = {}
    for factor in factors:
        losses = [record["loss/validation"] for record in mine if record["factor"] == factor]
        found[factor] = sum(losses) / len(losses)
    return found


def spread(losses: dict[float, float]) -> float:
    return max(losses.values()) - min(losses.values())


def draw(records: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
    for rule, label, style in ((True, "SDE rule", "o-"), (False, "settings fixed", "s--")):
        losses = by_batch(records, rule=rule)
        axes.plot(list(losses), list(losses.values()), style, label=f"{label}: spread {spread(losses):.3f}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("batch, times the base's (equal tokens)")
    axes.set_ylabel("validation bound, nats per token")
    axes.legend()
    figure.savefig(path, dpi=150)
    print(f"drawn to {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/trimodal/demo.yaml"))
    parser.add_argument("--steps", type=int, default=1200, help="at the base batch")
    parser.add_argument("--factors", default="0.25,1,4", help="of the base batch")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=None, help="write JSON here, and a plot beside it")
    parser.add_argument("overrides", nargs="*", help="settings for all, e.g. data.path=...")
    arguments = parser.parse_args()
    records = measure(arguments)
    table = Table("batch", "with the rule", "fixed settings", box=None, header_style="bold")
    ruled, fixed = by_batch(records, rule=True), by_batch(records, rule=False)
    for factor in ruled:
        table.add_row(f"x {factor:g}", f"{ruled[factor]:.4f}", f"{fixed[factor]:.4f}")
    table.add_row("spread", f"{spread(ruled):.4f}", f"{spread(fixed):.4f}")
    Console(highlight=False).print(table)
    facts = {"config": str(arguments.config), "steps": arguments.steps, "overrides": arguments.overrides}
    save(
        {**facts, "spread_rule": spread(ruled), "spread_fixed": spread(fixed), "runs": records}, arguments.out
    )
    if arguments.out is not None:
        draw(records, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
