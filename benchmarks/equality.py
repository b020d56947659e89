"""Every family in every layout against one process: how far losses and gradient norms are apart.

Tiny models on real ranks (gloo, CPU): 20 steps from the same first weights over the same rows. A cell is the greatest
relative difference of losses, training and validation, and of gradient norms. In fp32, one process has no ZeRO and
takes the whole batch at once, and both must agree to five digits. In bf16 it has ZeRO 1 (without it there are no exact
masters), and its losses must agree within 1e-3; norms are reported.

    python -m benchmarks.equality --out benchmarks/results/equality.json     # and equality.md beside it
    python -m benchmarks.equality --models gru lstm --layouts "tp2 sp" "cp2 summaries" --precisions fp32

The exit code is 1 where something disagrees.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks.common import save
from tests.harness import RanksFailed
from tests.pretrain.parallel.runs import (
    MODELS,
    Datasets,
    References,
    build_datasets,
    difference,
    import_megatron,
    train_in,
)
from tests.pretrain.parallel.table import LAYERS, LAYOUTS

STEPS = 20
LOSS_LIMITS = {"fp32": 1e-5, "bf16": 1e-3}
NORM_LIMITS = {"fp32": 1e-5}
IN_BF16 = ("dp2 ZeRO 1", "dp2 ZeRO 2", "dp2 ZeRO 3", "tp2", "cp2", "pp2 1F1B")


@dataclass(frozen=True)
class Case:
    precision: str
    model: str
    layout: str

    @property
    def shared(self) -> list[str]:
        """What the layout and the one process are both told."""
        common = [LAYERS, *LAYOUTS[self.layout].alone]
        return [*common, "precision.dtype=bf16"] if self.precision == "bf16" else common

    @property
    def sharded(self) -> list[str]:
        """bf16 has its masters in ZeRO's shards."""
        needs_zero = self.precision == "bf16" and "parallel.zero=0" in LAYOUTS[self.layout].settings
        return ["parallel.zero=1"] if needs_zero else []


@dataclass(frozen=True)
class Found:
    """The greatest relative differences, or why there are none."""

    losses: float | None
    norms: float | None
    agrees: bool
    failure: str = ""

    def __str__(self) -> str:
        text = "failed" if self.losses is None else f"{self.losses:.1e} / {self.norms:.1e}"
        return text if self.agrees else f"**{text}**"


def cases(models: list[str], layouts: list[str], precisions: list[str]) -> list[Case]:
    return [
        Case(precision, model, layout)
        for precision in precisions
        for model in models
        for layout in layouts
        if LAYOUTS[layout].suits(model) and (precision == "fp32" or layout in IN_BF16)
    ]


def compare(case: Case, folder: Path, data: Datasets, alone: References) -> Found:
    """Train in the layout, and in one process unless that is known already."""
    layout = LAYOUTS[case.layout]
    alone_sharded = ["parallel.zero=1"] if case.precision == "bf16" else []
    try:
        expected = alone(case.model, [*case.shared, *alone_sharded], STEPS)
        settings = [*case.shared, *layout.settings, *case.sharded]
        curve = train_in(folder, data, case.model, layout.ranks, settings, STEPS)
    except RanksFailed as error:
        return Found(None, None, False, str(error))
    losses, norms = difference(curve, expected)
    norm_limit = NORM_LIMITS.get(case.precision, float("inf"))
    return Found(losses, norms, losses <= LOSS_LIMITS[case.precision] and norms <= norm_limit)


def measure(chosen: list[Case], console: Console) -> dict[Case, Found]:
    found: dict[Case, Found] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = build_datasets(folder)
        alone = References(folder / "alone", data)
        import_megatron()
        for number, case in enumerate(track(chosen, "layouts", console=console)):
            found[case] = compare(case, folder / str(number), data, alone)
            if not found[case].agrees:
                console.print(f"{case.precision}, {case.model}, {case.layout}: {found[case]}")
                console.print(found[case].failure, markup=False)
    return found


def markdown(found: dict[Case, Found]) -> str:
    """A table per precision: layouts down, models across."""
    lines = ["# Layouts against one process", ""]
    lines += [
        f"Greatest relative difference of losses / of gradient norms over {STEPS} steps. Limits in fp32: "
        f"{LOSS_LIMITS['fp32']:.0e} / {NORM_LIMITS['fp32']:.0e}; in bf16: {LOSS_LIMITS['bf16']:.0e} for losses. "
        "Bold: beyond the limit.",
    ]
    for precision in dict.fromkeys(case.precision for case in found):
        models = dict.fromkeys(case.model for case in found if case.precision == precision)
        lines += ["", f"## {precision}", "", f"| layout | {' | '.join(models)} |"]
        lines += ["|---" * (1 + len(models)) + "|"]
        for layout in dict.fromkeys(case.layout for case in found if case.precision == precision):
            cells = (str(found.get(Case(precision, model, layout), "-")) for model in models)
            lines += [f"| {layout} | {' | '.join(cells)} |"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--layouts", nargs="+", choices=[*LAYOUTS], default=[*LAYOUTS], metavar="LAYOUT")
    parser.add_argument("--precisions", nargs="+", choices=[*LOSS_LIMITS], default=[*LOSS_LIMITS])
    parser.add_argument("--out", type=Path, default=None, help="write JSON here, and Markdown beside it")
    arguments = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    found = measure(cases(arguments.models, arguments.layouts, arguments.precisions), console)
    table = markdown(found)
    console.print(table, markup=False)
    if arguments.out is not None:
        arguments.out.with_suffix(".md").write_text(table, encoding="utf-8")
    save(
        {"steps": STEPS, "cases": [asdict(case) | asdict(one) for case, one in found.items()]}, arguments.out
    )
    disagreeing = sum(not one.agrees for one in found.values())
    sys.exit(f"{disagreeing} of {len(found)} disagree" if disagreeing else 0)


if __name__ == "__main__":
    main()
