"""What the shipped configs of 1B and more come to on 8, 64 and 256 GPUs: by `parallel: auto`, and as they were before.

    python -m benchmarks.plan_shipped
    python -m benchmarks.plan_shipped --families sigmoid hybrid --sizes 7b --gpus 64 --out shipped.json

By the plan alone, no GPU needed; ten minutes for all. "before" are the layouts that these configs carried until
`parallel: auto`: full checkpointing for recurrences and for 7B, ZeRO 1 to 3 by size.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import save
from pretrain.config import load_config
from pretrain.errors import ConfigError
from pretrain.plan.auto import choose_layout
from pretrain.plan.estimate import make_plan
from pretrain.plan.layouts import GIB, describe
from pretrain.plan.machine import planned_machine

FAMILIES = ("sigmoid", "softmax", "pararnn/gru", "pararnn/lstm", "mamba2", "hybrid", "trimodal")
SIZES = ("1b", "3b", "7b")
BEFORE_ROWS = {
    "pararnn/gru": (32, 16, 8),
    "pararnn/lstm": (32, 16, 8),
    "mamba2": (32, 16, 8),
    "hybrid": (16, 8, 4),
}
"""Of a micro-batch, by size; of the attention families (4, 2, 1)."""


def before(family: str, size: str) -> list[str]:
    """The layout that the config carried, as overrides."""
    place = SIZES.index(size)
    recurrent = family in BEFORE_ROWS
    zero = 3 if size == "7b" else 1 if recurrent or size == "1b" else 2
    checkpointing = "full" if recurrent or size == "7b" else "none"
    rows = BEFORE_ROWS.get(family, (4, 2, 1))[place]
    return [
        "parallel.tensor=1",
        "parallel.sequence=false",
        "parallel.context=1",
        "parallel.pipeline=1",
        f"parallel.zero={zero}",
        f"parallel.activation_checkpointing={checkpointing}",
        f"data.micro_batch_rows={rows}",
    ]


def main(arguments: list[str] | None = None) -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--gpus", nargs="+", type=int, default=(8, 64, 256))
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    paths = [
        (family, size, Path("configs") / family / f"{size}.yaml")
        for family in options.families
        for size in options.sizes
    ]
    paths = [one for one in paths if one[2].is_file()]
    console = Console()
    results = []
    for family, size, path in track(paths, "planning", console=console, transient=True):
        results += figures(family, size, path, options.gpus, options.gpu)
        if options.out:
            save({"gpu": options.gpu, "layouts": results}, options.out, quiet=True)
    table = Table("config")
    for heading in ("GPUs", "s/step before", "MFU", "s/step now", "MFU", "GiB"):
        table.add_column(heading, justify="right")
    table.add_column("layout")
    for one in results:
        old = (
            [f"{one['before']['seconds']:.3g}", f"{one['before']['mfu']:.0%}"]
            if one["before"]
            else ["-", "-"]
        )
        new = one["now"]
        now = [f"{new['seconds']:.3g}", f"{new['mfu']:.0%}", f"{new['gib']:.3g}", new["layout"]]
        table.add_row(
            one["config"],
            str(one["gpus"]),
            *old,
            *(now if "seconds" in new else ["-", "-", "-", new["layout"]]),
        )
    console.print(table)
    if options.out:
        save({"gpu": options.gpu, "layouts": results}, options.out)


def figures(family: str, size: str, path: Path, gpus: list[int], gpu: str) -> list[dict[str, Any]]:
    """Of one config, by number of GPUs."""
    known: dict[Any, Any] = {}
    found = []
    for count in gpus:
        config = load_config(path, ["model.vocabulary=32768"])
        choice = choose_layout(config, count, planned_machine(config, gpu), known)
        plan = make_plan(choice.config, gpus=count, gpu=gpu)
        rows = plan.layout.micro_batch_rows
        now = {
            "seconds": plan.layout.time.total,
            "mfu": plan.mfu,
            "gib": plan.memory.total / GIB,
            "layout": f"{describe(choice.config.parallel)}, rows {rows} x {plan.layout.accumulation}",
        }
        found.append(
            {
                "config": f"{family}/{size}",
                "gpus": count,
                "now": now,
                "before": _before(family, size, path, count, gpu),
            }
        )
    return found


def _before(family: str, size: str, path: Path, count: int, gpu: str) -> dict[str, float] | None:
    """None where it did not fit its GPUs."""
    config = load_config(path, ["model.vocabulary=32768", *before(family, size)])
    try:
        plan = make_plan(config, gpus=count, gpu=gpu)
    except ConfigError:
        return None
    if plan.memory.total > plan.accelerator.memory_gib * GIB:
        return None
    return {"seconds": plan.layout.time.total, "mfu": plan.mfu, "gib": plan.memory.total / GIB}


if __name__ == "__main__":
    main()
